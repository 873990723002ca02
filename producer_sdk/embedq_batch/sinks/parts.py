"""Files of vectors. Vectors are collected in parts beside the file, which is made of them in the end, and replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType, taken
from embedq_batch.errors import BadTarget
from embedq_batch.manifest.place import MANIFEST, beside
from embedq_batch.sinks.arrow import arrow_batch, arrow_schema
from embedq_batch.sinks.sink import Final as FinalFile
from embedq_batch.sinks.sink import PartsRecord


class PartsSink:
    """A file that appears under its name when it is complete, and until then as parts in the folder `NAME.embedq` beside it.

    Invariants:
        - A part has its name when all of it is on the disk, and the manifest knows rows of such parts alone.
        - The file is made of the rows that the manifest knows, each once, in the order of parts; those that another part has
          anew, or that were deleted, are left out.
        - The parts stay: the next run, for what has changed, makes the file of them anew.
    """

    def __init__(self, path: Path, final: FinalFile) -> None:
        self._path = path
        self._final = final
        self._folder = beside(path)
        self._shape: Shape | None = None
        self._schema: pa.Schema | None = None
        self._number = 0
        self._writer: Any = None
        self._rows = 0

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def manifest(self) -> Path:
        return self._folder / MANIFEST

    @property
    def dtypes(self) -> frozenset[VectorType]:
        return self._final.dtypes

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        known = record.parts()
        if not known and not force:
            for path in (self._path, *self._final.others(self._path)):
                if path.exists():
                    raise BadTarget(
                        target=str(path),
                        reason="exists, and no manifest knows it: give another name, or --force to overwrite it",
                    )
        self._shape = shape
        self._schema = arrow_schema(shape)
        self._number = max(known, default=0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            names = {self._part(number).name for number in known}
            for path in self._folder.glob("part-*"):
                if path.name not in names:
                    path.unlink()  # a kill came between the part and the manifest, or everything in it is out of date
        except OSError as error:
            raise self._failed(error) from None

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None or self._schema is None:
            raise RuntimeError("a file is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:  # another model: a part has vectors of one width
            if self._writer is not None:
                raise RuntimeError("vectors of two models come to one part. This is a bug.")
            self._shape = _of_width(self._shape, batch.vectors.shape[1])
            self._schema = arrow_schema(self._shape)
        try:
            if self._writer is None:
                self._writer = pa.ipc.new_file(str(self._aside(self._number + 1)), self._schema)
            self._writer.write_batch(arrow_batch(batch, self._shape, self._schema))
        except OSError as error:
            raise self._failed(error) from None
        start, self._rows = self._rows, self._rows + len(batch)
        return start

    def flush(self) -> int:
        if self._writer is None:
            return self._number
        try:
            self._writer.close()
            aside = self._aside(self._number + 1)
            _sync(aside)
            os.replace(aside, self._part(self._number + 1))
            _sync(self._folder)
        except OSError as error:
            raise self._failed(error) from None
        self._number += 1
        self._writer, self._rows = None, 0
        return self._number

    def delete(self, ids: Sequence[RowId]) -> None:
        """Nothing: rows that the manifest forgets are left out when the file is made."""

    def finish(self, record: PartsRecord) -> None:
        if self._shape is None:
            raise RuntimeError("a file is finished before it is opened. This is a bug.")
        aside = self._path.with_name(f".{self._path.name}.embedq-new")
        try:
            self._final.write(aside, self._shape, self._current(record))
            for path, new in zip(
                (*self._final.others(self._path), self._path),
                (*self._final.others(aside), aside),
                strict=True,
            ):
                _sync(new)
                os.replace(new, path)
            _sync(self._path.parent)
            current = {self._part(number) for number in record.parts()}
            for part in self._folder.glob("part-*"):
                if part not in current:
                    part.unlink()
        except OSError as error:
            raise self._failed(error) from None

    def complete(self) -> bool:
        return self._path.exists()

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        if self._shape is None:
            raise RuntimeError("a file is read before it is opened. This is a bug.")
        wanted = set(ids)
        found: dict[RowId, npt.NDArray[np.float32]] = {}
        for some, vectors in self._final.read(self._path, self._shape):
            found.update({id: vectors[n].copy() for n, id in enumerate(some) if id in wanted})
        return found

    def point(self, alias: str) -> str | None:
        """A symbolic link, which is replaced as a whole."""
        if self._final.others(self._path):
            raise BadTarget(
                target=str(self._path),
                reason="has a second file with its ids, and one link names one: a pointer file, NAME.json, names both",
            )
        link = Path(alias)
        before = os.readlink(link) if link.is_symlink() else None
        if before is None and link.exists():
            raise BadTarget(target=alias, reason="is a file of its own, not a link that can be switched")
        if not self._path.exists():
            raise BadTarget(target=str(self._path), reason="no such file")
        aside = link.with_name(f".{link.name}.embedq-new")
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(os.path.relpath(self._path, link.parent))
            os.replace(aside, link)
        except OSError as error:
            raise self._failed(error) from None
        return before

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _current(self, record: PartsRecord) -> Iterator[pa.RecordBatch]:
        """The rows of all parts that count."""
        for number, vectors in record.parts().items():
            with pa.memory_map(str(self._part(number))) as file:
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
                if vectors == sum(
                    batch.num_rows for batch in map(reader.get_batch, range(reader.num_record_batches))
                ):
                    yield from batches
                else:
                    yield from _at(batches, record.in_part(number))

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.arrow"

    def _aside(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.new"

    def _failed(self, error: OSError) -> BadTarget:
        return BadTarget(target=str(self._path), reason=error.strerror or str(error))


def _at(batches: Iterable[pa.RecordBatch], places: Sequence[tuple[int, int]]) -> Iterator[pa.RecordBatch]:
    """The rows of a part's batches at these places: where each begins, and how many they are."""
    left = iter(places)
    place = next(left, None)
    first = 0
    for batch in batches:
        rows: list[int] = []
        while place is not None and place[0] < first + batch.num_rows:
            rows.extend(range(place[0] - first, place[0] - first + place[1]))
            place = next(left, None)
        first += batch.num_rows
        if len(rows) == batch.num_rows:
            yield batch
        elif rows:
            yield taken(batch, rows)


def _of_width(shape: Shape, width: int) -> Shape:
    return Shape(
        width=width,
        dtype=shape.dtype,
        spans=shape.spans,
        ids=shape.ids,
        kept=shape.kept,
        model_version=shape.model_version,
    )


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
