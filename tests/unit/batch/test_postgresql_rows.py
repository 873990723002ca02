"""Rows that are made for PostgreSQL's COPY column by column are what its format says they are, row by row."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embedq_batch.clients import postgresql as binary

numbers = st.integers(-(1 << 63), (1 << 63) - 1)
columns = st.integers(1, 5).flatmap(
    lambda rows: st.lists(
        st.one_of(
            st.lists(numbers, min_size=rows, max_size=rows),
            st.binary(max_size=5),
            st.lists(st.none() | st.binary(max_size=5), min_size=rows, max_size=rows),
            arrays.arrays(np.float32, (rows, 3), elements=st.floats(-1, 1, width=32)),
        ).map(lambda column: (rows, column)),
        min_size=1,
        max_size=5,
    )
)


def rows_of(copied: bytes) -> list[list[bytes | None]]:
    """The fields of each row, as PostgreSQL's documentation of COPY has the format."""
    head, left = copied[:19], copied[19:]
    assert head == b"PGCOPY\n\xff\r\n\0" + bytes(8)
    rows: list[list[bytes | None]] = []
    while (count := struct.unpack_from("!h", left)[0]) != -1:
        left, fields = left[2:], []
        for _ in range(count):
            (length,) = struct.unpack_from("!i", left)
            fields.append(None if length == -1 else left[4 : 4 + length])
            left = left[4 + max(length, 0) :]
        rows.append(fields)
    assert left == b"\xff\xff"
    return rows


@given(columns)
def test_every_field_of_every_row_is_where_the_format_has_it(given: list[tuple[int, Any]]) -> None:
    rows = given[0][0]
    made: list[Any] = []
    expected: list[list[bytes | None]] = [[] for _ in range(rows)]
    for _, column in given:
        match column:
            case bytes():
                made.append(binary.same(column, rows))
                fields = [column] * rows
            case np.ndarray():
                made.append(binary.vectors(column))
                fields = [struct.pack("!hh3f", 3, 0, *row) for row in column.tolist()]
            case [int(), *_]:
                made.append(binary.integers(column))
                fields = [struct.pack("!q", number) for number in column]
            case _:
                made.append(column)
                fields = column
        for row, field in zip(expected, fields, strict=True):
            row.append(field)

    assert rows_of(binary.copied(made)) == expected


def test_short_vectors_are_as_pgvector_has_them() -> None:
    halves = np.array([[1.0, -2.0]], np.float16)
    bits = np.array([[0b10100000, 0b00000001]], np.uint8)

    assert rows_of(binary.copied([binary.vectors(halves)])) == [[struct.pack("!hh2e", 2, 0, 1.0, -2.0)]]
    assert rows_of(binary.copied([binary.vectors(bits)])) == [[struct.pack("!i2B", 16, 0b10100000, 1)]]


@pytest.mark.parametrize("bad", [1 << 63, -(1 << 63) - 1])
def test_an_integer_of_more_than_64_bits_is_refused(bad: int) -> None:
    with pytest.raises(OverflowError):
        binary.integers([1, bad])
