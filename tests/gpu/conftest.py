"""The directories that the CPU's tests use, too."""

from tests.helpers.encoders import model_path
from tests.helpers.triton import interpret_without_gpu

__all__ = ["model_path"]

interpret_without_gpu()
