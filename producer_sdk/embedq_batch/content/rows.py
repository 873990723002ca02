"""Rows on their way from a source to a target: texts first, vectors later, and the columns that go along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeGuard, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_128_digest

_T = TypeVar("_T")

RowId = str | int

BATCH_ROWS: Final = 1024
"""Rows that a source gives at once at most: enough for 16 jobs."""
BATCH_BYTES: Final = 32 << 20
"""Of what is read at once, about: a thousand books would be a gigabyte."""

HASH_BYTES: Final = 16
"""Of a row's content. Two contents of one row that differ have the same with a chance of 2⁻¹²⁸."""

VectorType = Literal["float32", "float16", "int8", "binary"]


def are_texts(values: Sequence[str | Problem]) -> TypeGuard[list[str]]:
    """Whether none of them is a problem, which is the usual case."""
    return Problem not in set(map(type, values))


def rows_at_once(rows: int, size: int) -> int:
    """How many rows are read at once, where so many have this many bytes."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))


def quoted(value: RowId) -> str:
    """An id, or a name, as SQL and what is like it have it."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


class Problem(msgspec.Struct, frozen=True):
    """Why a row cannot be embedded, or was not: a code for programs, and a message that repeats no text."""

    code: str
    message: str


class RowBatch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Rows of a source, column by column, in the source's order.

    A text that cannot be embedded is a `Problem`. `kept` has the columns that go along, with as many rows; None: none do.
    `deleted` are ids whose rows the source says are gone.
    """

    ids: list[RowId]
    texts: list[str | Problem]
    kept: pa.RecordBatch | None = None
    deleted: list[RowId] = []

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: Sequence[int]) -> RowBatch:
        """Some of the rows, by index; those of a range without copying what is kept."""
        return RowBatch(
            ids=picked(self.ids, rows),
            texts=picked(self.texts, rows),
            kept=None if self.kept is None else taken(self.kept, rows),
        )

    def hashes(self) -> list[bytes]:
        """`HASH_BYTES` for each row: equal when text and kept columns are."""
        if self.kept is None:
            return [
                xxh3_128_digest(text.encode()) if isinstance(text, str) else content_hash(text, ())
                for text in self.texts
            ]
        beside = zip(*(column.to_pylist() for column in self.kept.columns), strict=True)
        return [content_hash(text, kept) for text, kept in zip(self.texts, beside, strict=True)]


def content_hash(text: str | Problem, kept: tuple[Any, ...]) -> bytes:
    """`HASH_BYTES`: equal when the text and what is kept beside it are.

    Not a secret one: who writes both texts of a row can make them equal in this, and keeps a vector of their own from being renewed.
    """
    if kept or not isinstance(text, str):
        return xxh3_128_digest(_plain.encode((text, kept)))
    return xxh3_128_digest(text.encode())


_plain: Final = msgspec.msgpack.Encoder(enc_hook=repr, order="deterministic")


def picked(values: list[_T], rows: Sequence[int]) -> list[_T]:
    """Some values, by index."""
    if isinstance(rows, range) and rows.step == 1:
        return values[rows.start : rows.stop]
    return [values[n] for n in rows]


def taken(batch: pa.RecordBatch, rows: Sequence[int]) -> pa.RecordBatch:
    """Some rows of a batch, by index; those of a range are not copied."""
    if isinstance(rows, range) and rows.step == 1:
        return batch.slice(rows.start, len(rows))
    return batch.take(pa.array(rows, pa.int64()))


class Shape(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a target is told before it gets the first row."""

    width: int
    """Numbers in a vector; with dtype "binary" bytes, of eight dimensions each."""
    dtype: VectorType
    spans: bool
    """Whether a row may have several vectors, each with its place in the text."""
    ids: Literal["string", "integer"]
    """What ids are: all integers, or else strings."""
    kept: pa.Schema | None
    model_version: str

    @property
    def dimensions(self) -> int:
        """Dimensions of a vector."""
        return self.width * 8 if self.dtype == "binary" else self.width

    def id_of(self, id: RowId) -> RowId:
        """An id as the target has it."""
        return str(id) if self.ids == "string" else id


class VectorBatch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Vectors of one model version, with what belongs to them, column by column.

    `vectors` is (n, width) of float32, float16, int8 (with `scales`, x ≈ q · scale) or uint8 with packed bits. With spans a
    row's vectors have the ids `ID#0`, `ID#1`, …, and `rows` says whose they are; `spans` is (n, 2), `[start, end)` in characters.
    """

    ids: list[RowId]
    vectors: npt.NDArray[Any]
    model_version: str
    tokens: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32] | None = None
    rows: list[RowId] | None = None
    spans: npt.NDArray[np.int32] | None = None
    kept: pa.RecordBatch | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int) -> VectorBatch:
        """Some of them, in a row."""
        return VectorBatch(
            ids=self.ids[start:end],
            vectors=self.vectors[start:end],
            model_version=self.model_version,
            tokens=self.tokens[start:end],
            scales=None if self.scales is None else self.scales[start:end],
            rows=None if self.rows is None else self.rows[start:end],
            spans=None if self.spans is None else self.spans[start:end],
            kept=None if self.kept is None else self.kept.slice(start, end - start),
        )

    def floats(self) -> npt.NDArray[np.float32]:
        """The vectors as float32 (n, dimensions); packed bits as 0 and 1."""
        if self.vectors.dtype == np.uint8:
            return np.unpackbits(self.vectors, axis=1).astype(np.float32)
        found = self.vectors.astype(np.float32, copy=False)
        return found if self.scales is None else found * self.scales[:, None]

    def kept_rows(self) -> list[dict[str, Any]]:
        """What is kept beside each vector."""
        return [{} for _ in self.ids] if self.kept is None else self.kept.to_pylist()


def joined(batches: Sequence[VectorBatch]) -> VectorBatch:
    """Batches of one model version and one width as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    return VectorBatch(
        ids=[id for batch in batches for id in batch.ids],
        vectors=np.concatenate([batch.vectors for batch in batches]),
        model_version=first.model_version,
        tokens=np.concatenate([batch.tokens for batch in batches]),
        scales=None
        if first.scales is None
        else np.concatenate([batch.scales for batch in batches if batch.scales is not None]),
        rows=None if first.rows is None else [row for batch in batches for row in batch.rows or ()],
        spans=None
        if first.spans is None
        else np.concatenate([batch.spans for batch in batches if batch.spans is not None]),
        kept=None
        if first.kept is None
        else pa.Table.from_batches([batch.kept for batch in batches]).combine_chunks().to_batches()[0],
    )
