"""Encoders under test, and sentence-transformers on the same directories, float32 on the CPU."""

from tests.helpers.encoders import encoder_of, model_path, reference_of
from tests.helpers.triton import interpret_without_gpu

__all__ = ["encoder_of", "model_path", "reference_of"]

interpret_without_gpu()
