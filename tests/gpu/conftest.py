"""The directories that the CPU"s tests use, too."""

from tests.helpers.encoders import model_path

__all__ = ["model_path"]
