"""Vectors as bytes: the four dtypes of the wire contract, little-endian."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_shared.messages import Dtype

NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "binary": np.dtype("u1"),
}

_SQUARES_WELL: Final = np.float32(1e-15)
"""Norms between this and its inverse can be computed from squares in float32 without loss."""


def vector_bytes(dimensions: int, dtype: Dtype) -> int:
    """Bytes of one vector on the wire."""
    return dimensions // 8 if dtype == "binary" else dimensions * NUMPY[dtype].itemsize


def cut_and_normalize(vector: npt.NDArray[np.float32], dimensions: int) -> npt.NDArray[np.float32]:
    """The first `dimensions` components, then scaled to length 1, in float32 (Matryoshka order).

    A vector that is zero after the cut stays zero, since no direction is left to keep.
    """
    cut = np.asarray(vector[:dimensions], dtype=np.float32)
    norm = np.sqrt(np.dot(cut, cut))
    if not _SQUARES_WELL < norm < 1 / _SQUARES_WELL:
        # The squares are outside of float32's range, or nearly: scale the components to 1 first.
        peak = np.max(np.abs(cut), initial=0.0)
        if peak == 0:
            return cut
        cut = cut / peak
        norm = np.sqrt(np.dot(cut, cut))
    unit: npt.NDArray[np.float32] = cut / norm
    return unit


def quantize(vector: npt.NDArray[np.float32], dtype: Dtype) -> tuple[bytes, float | None]:
    """The wire bytes of a unit vector, and for int8 its scale (x ≈ q · scale, symmetric, one scale a vector)."""
    match dtype:
        case "float32":
            return vector.astype("<f4", copy=False).tobytes(), None
        case "float16":
            return vector.astype("<f2").tobytes(), None
        case "int8":
            peak = float(np.max(np.abs(vector), initial=0.0))
            scale = peak / 127 if peak > 0 else 1.0
            return np.rint(vector / np.float32(scale)).astype("i1").tobytes(), scale
        case "binary":
            return np.packbits(vector > 0).tobytes(), None


def dequantize(raw: bytes, dtype: Dtype, scale: float | None = None) -> npt.NDArray[np.float32]:
    """float32 (dimensions,) from wire bytes; binary becomes 0.0 and 1.0, most significant bit first."""
    stored = np.frombuffer(raw, dtype=NUMPY[dtype])
    match dtype:
        case "int8":
            return stored.astype(np.float32) * np.float32(1.0 if scale is None else scale)
        case "binary":
            return np.unpackbits(stored).astype(np.float32)
        case _:
            return stored.astype(np.float32)
