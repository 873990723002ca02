"""Rows as PostgreSQL's COPY takes them in binary, made column by column.

One row after the other, each as a Python tuple, costs a store more processor time than the store's own work, and takes Python's lock from
the rest of the run. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END: Final = b"\xff\xff"
_NULL: Final = b"\xff\xff\xff\xff"
"""Instead of a value's length."""

Fixed = npt.NDArray[np.uint8]
"""A column whose fields have one length, (rows, bytes): each begins with the value's length, in 32 bits, highest byte first."""
Values = Sequence[bytes | bytearray | memoryview | None]
"""A column of values of any length."""


def integers(values: Sequence[int] | npt.NDArray[Any]) -> Fixed:
    """A column of bigint.

    Raises:
        OverflowError, ValueError, TypeError: one is no integer of 64 bits.
    """
    return _fixed(np.asarray(values, np.int64).astype(">i8")[:, None])


def same(value: bytes, rows: int) -> Fixed:
    """A column with this value in every row."""
    field = len(value).to_bytes(4, "big") + value
    return np.broadcast_to(np.frombuffer(field, np.uint8), (rows, len(field)))


def vectors(given: npt.NDArray[Any]) -> Fixed:
    """A column of vector, halfvec or, of packed bits, bit: (rows, width) of float32, float16 or uint8.

    pgvector's two have a number of 16 bits for the length, another one that is 0, and then numbers with the highest byte first; bits have
    32 bits for how many they are.
    """
    if given.dtype == np.uint8:
        head = (8 * given.shape[1]).to_bytes(4, "big")
    else:
        head = given.shape[1].to_bytes(2, "big") + bytes(2)
    return _fixed(given.astype(given.dtype.newbyteorder(">"), copy=False), head)


def copied(columns: Sequence[Fixed | Values]) -> bytes:
    """All that a COPY is given for these columns of at least one row, from its first byte to its last."""
    rows = len(columns[0])
    number = np.frombuffer(len(columns).to_bytes(2, "big"), np.uint8)
    pieces: list[Sequence[bytes]] = []
    fixed: list[Fixed] = [np.broadcast_to(number, (rows, 2))]
    for column in columns:
        if isinstance(column, np.ndarray):
            fixed.append(column)
            continue
        if fixed:
            pieces.append(_cut(fixed))
            fixed = []
        pieces.append([_NULL if value is None else len(value).to_bytes(4, "big") + value for value in column])
    if not pieces:  # nothing is to be put between
        return b"".join([_SIGNATURE, np.concatenate(fixed, axis=1).tobytes(), _END])
    if fixed:
        pieces.append(_cut(fixed))
    return b"".join(chain([_SIGNATURE], _in_turn(pieces), [_END]))


def _in_turn(pieces: list[Sequence[bytes]]) -> Iterator[bytes]:
    return chain.from_iterable(zip(*pieces, strict=True))


def _fixed(values: npt.NDArray[Any], head: bytes = b"") -> Fixed:
    """Fields of values of one length, (rows, numbers), each with this before it."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    start = (len(head) + raw.shape[1]).to_bytes(4, "big") + head
    found = np.empty((len(raw), len(start) + raw.shape[1]), np.uint8)
    found[:, : len(start)] = np.frombuffer(start, np.uint8)
    found[:, len(start) :] = raw
    return found


def _cut(columns: list[Fixed]) -> list[bytes]:
    """The fields of columns that follow each other, together, row by row."""
    together = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
    width = together.shape[1]
    whole = together.tobytes()
    return [whole[start : start + width] for start in range(0, len(whole), width)]
