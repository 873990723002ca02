"""What a target of vectors is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType


class PartsRecord(Protocol):
    """What the manifest knows of a target that is written in parts."""

    def parts(self) -> Mapping[int, int]:
        """The parts in which rows are, by number, in order, and the number of vectors that count in each."""

    def in_part(self, part: int) -> Sequence[tuple[int, int]]:
        """Where each row's vectors begin in a part, and how many they are, in order; of rows that count alone."""


class Sink(Protocol):
    """A store, or a file. It is used in one thread, and may block there.

    Writing is an upsert by id: whatever is written again, after a kill for instance, replaces what was there.
    """

    @property
    def name(self) -> str:
        """What is written, without secrets: a manifest and messages show it."""

    @property
    def manifest(self) -> Path:
        """Where the run's manifest is unless somebody says otherwise."""

    @property
    def dtypes(self) -> frozenset[VectorType]:
        """What vectors may be made of."""

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        """Connect, and make what is missing: a table, a collection.

        Raises:
            BadTarget: it cannot hold such vectors, or is somebody else's; with `force` that does not matter to files.
            TargetAway.
        """

    def write(self, batch: VectorBatch) -> int:
        """Write vectors, all of them or none; returns where the first one is in the present part, or 0.

        Raises:
            RowsRefused, TargetAway.
        """

    def flush(self) -> int:
        """Make all that was written safe from a kill; returns the number of the part that it is in, or 0.

        Raises:
            TargetAway.
        """

    def delete(self, ids: Sequence[RowId]) -> None:
        """Delete vectors by their ids. What is not there is passed.

        Raises:
            TargetAway.
        """

    def finish(self, record: PartsRecord) -> None:
        """All rows are written: make it what its reader expects."""

    def complete(self) -> bool:
        """Whether what `finish` makes is there."""

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        """Vectors as the store gives them back, by id; those that are not there are missing."""

    def close(self) -> None:
        """Let go of files and connections. What was not flushed may be lost."""


@runtime_checkable
class Counted(Protocol):
    """A target that says how many vectors it has, whatever a manifest knows."""

    def stored(self, version: str | None = None) -> int:
        """Vectors of this model version, or of all. It may be asked before `open`.

        Raises:
            BadTarget, TargetAway.
        """


@runtime_checkable
class Followed(Sink, Protocol):
    """A target that a topic may be followed into: it keeps rows by id without a manifest, and knows all vectors of a row by the row."""

    def kept_types(self, names: Sequence[str]) -> pa.Schema | None:
        """The types of those of these columns that it has already, of a kind that JSON has; of lists and objects of any kind null.

        None where it has no table yet, or columns without types. It is asked before `open`.

        Raises:
            BadTarget.
        """

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        """Delete the vectors of these rows but for those with the ids `but`. It was opened for spans.

        Raises:
            TargetAway.
        """


@runtime_checkable
class Switchable(Protocol):
    """A target that readers can be given under another name, which means one target at a time."""

    def point(self, alias: str) -> str | None:
        """Make `alias` mean this target, in one step; what it meant before, if anything.

        Raises:
            BadTarget: it cannot, or the name is something else.
        """


class Final(Protocol):
    """A file of vectors of one kind, as it is written once all of them are known."""

    suffix: str
    dtypes: frozenset[VectorType]

    def write(self, path: Path, shape: Shape, batches: Iterator[Any]) -> None:
        """Write Arrow batches of `arrow_schema(shape)` to a new file."""

    def read(self, path: Path, shape: Shape) -> Iterator[tuple[list[RowId], npt.NDArray[np.float32]]]:
        """Its ids and vectors, some at a time."""

    def others(self, path: Path) -> list[Path]:
        """Files that belong to it."""
