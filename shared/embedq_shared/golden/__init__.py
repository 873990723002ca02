"""Golden files: texts and the vectors that a model must give for them."""

from embedq_shared.golden.content import (
    MOST_BYTES,
    MOST_TEXTS,
    Golden,
    GoldenText,
    cosine_of,
    decode_golden,
    encode_golden,
)

__all__ = ["MOST_BYTES", "MOST_TEXTS", "Golden", "GoldenText", "cosine_of", "decode_golden", "encode_golden"]
