"""Vectors as bytes: cut, normalize, four dtypes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedq_shared.messages import Dtype
from embedq_shared.vectors import cut_and_normalize, dequantize, quantize, vector_bytes

Vector = npt.NDArray[np.float32]

raw_vectors = arrays(
    np.float32, st.integers(8, 96), elements=st.floats(-8, 8, width=32, allow_subnormal=False)
)


def unit(vector: Vector) -> Vector:
    assume(np.linalg.norm(vector) > 1e-3)
    return cut_and_normalize(vector, len(vector))


# -- cut, then normalize ----------------------------------------------------------------------------------------------


@given(raw_vectors, st.integers(1, 96))
def test_a_cut_vector_is_the_beginning_scaled_to_length_one(vector: Vector, dimensions: int) -> None:
    dimensions = min(dimensions, len(vector))
    assume(np.linalg.norm(vector[:dimensions]) > 1e-3)
    found = cut_and_normalize(vector, dimensions)
    assert found.dtype == np.float32
    assert found.shape == (dimensions,)
    exact = vector[:dimensions].astype(np.float64)
    np.testing.assert_allclose(found, exact / np.linalg.norm(exact), atol=1e-6)


@given(raw_vectors, st.integers(8, 96))
def test_a_cut_may_follow_a_normalized_vector_too(vector: Vector, dimensions: int) -> None:
    """So that a cached vector of all dimensions answers for every smaller one."""
    dimensions = min(dimensions, len(vector))
    whole = unit(vector)
    assume(np.linalg.norm(whole[:dimensions]) > 1e-2)
    np.testing.assert_allclose(
        cut_and_normalize(whole, dimensions), cut_and_normalize(vector, dimensions), atol=1e-5
    )


def test_a_zero_vector_stays_zero_without_a_warning() -> None:
    assert cut_and_normalize(np.zeros(32, np.float32), 32).tolist() == [0.0] * 32


def test_the_vector_given_is_not_changed() -> None:
    vector = np.array([3.0, 4.0, 12.0], np.float32)
    assert cut_and_normalize(vector, 2).tolist() == pytest.approx([0.6, 0.8])
    assert vector.tolist() == [3.0, 4.0, 12.0]


# -- dtypes -----------------------------------------------------------------------------------------------------------


@given(raw_vectors)
def test_float32_comes_back_bit_for_bit(vector: Vector) -> None:
    raw, scale = quantize(vector, "float32")
    assert scale is None
    assert dequantize(raw, "float32").tobytes() == vector.tobytes()


def test_float32_is_little_endian() -> None:
    raw, _ = quantize(np.array([1.0, -2.0], np.float32), "float32")
    assert raw.hex() == "0000803f" + "000000c0"


@given(raw_vectors)
def test_float16_is_the_nearest_half(vector: Vector) -> None:
    vector = unit(vector)
    raw, scale = quantize(vector, "float16")
    assert scale is None
    assert raw == vector.astype("<f2").tobytes()
    np.testing.assert_allclose(dequantize(raw, "float16"), vector, rtol=2**-11, atol=2**-24)


def test_float16_is_little_endian() -> None:
    assert quantize(np.array([1.0], np.float32), "float16")[0].hex() == "003c"


@given(raw_vectors)
def test_int8_is_within_half_a_step(vector: Vector) -> None:
    vector = unit(vector)
    raw, scale = quantize(vector, "int8")
    assert scale is not None
    assert scale > 0
    stored = np.frombuffer(raw, np.int8).astype(np.float64)
    # Dividing in float32 may tip a value that lies half-way.
    assert np.max(np.abs(vector - stored * scale)) <= scale / 2 * (1 + 1e-4)
    np.testing.assert_allclose(dequantize(raw, "int8", scale), stored * scale, rtol=1e-6)


@given(raw_vectors)
def test_int8_uses_its_whole_range_symmetrically(vector: Vector) -> None:
    vector = unit(vector)
    stored = np.frombuffer(quantize(vector, "int8")[0], np.int8).astype(int)
    assert np.max(np.abs(stored)) == 127
    mirrored = np.frombuffer(quantize(-vector, "int8")[0], np.int8).astype(int)
    assert (mirrored == -stored).all()


def test_an_int8_zero_vector_has_a_usable_scale() -> None:
    raw, scale = quantize(np.zeros(32, np.float32), "int8")
    assert raw == bytes(32)
    assert scale == 1.0


@given(arrays(np.float32, st.integers(1, 12).map(lambda n: n * 8), elements=st.floats(-1, 1, width=32)))
def test_binary_packs_the_first_dimension_into_the_highest_bit(vector: Vector) -> None:
    raw, scale = quantize(vector, "binary")
    assert scale is None
    bits = "".join(f"{byte:08b}" for byte in raw)
    assert bits == "".join("1" if x > 0 else "0" for x in vector)
    assert dequantize(raw, "binary").tolist() == [1.0 if x > 0 else 0.0 for x in vector]


def test_binary_takes_zero_for_not_positive() -> None:
    vector = np.array([0.0, -0.0, 1e-30, -1e-30, 1, -1, 0, 1], np.float32)
    assert quantize(vector, "binary")[0] == bytes([0b00101001])


@pytest.mark.parametrize(("dtype", "size"), [("float32", 256), ("float16", 128), ("int8", 64), ("binary", 8)])
def test_a_vector_takes_as_many_bytes_as_said(dtype: Dtype, size: int) -> None:
    assert vector_bytes(64, dtype) == size
    assert len(quantize(np.linspace(-1, 1, 64, dtype=np.float32), dtype)[0]) == size


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-12, 1.0, 1e12, 1e25, 3e38])
def test_components_of_any_size_give_a_vector_of_length_1(size: float) -> None:
    vector = np.array([0.5, -1.0, 0.25, 0.0] * 16, dtype=np.float32) * np.float32(size)
    with np.errstate(over="ignore"):
        found = cut_and_normalize(vector, 64)
    np.testing.assert_allclose(np.linalg.norm(found), 1.0, atol=1e-5)
    np.testing.assert_allclose(found, cut_and_normalize(vector / np.float32(size), 64), atol=1e-6)
