"""JSON Lines, in files or from standard input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.inference import LOOKED_AT, inferred
from embedq_batch.content.rows import BATCH_BYTES, BATCH_ROWS, Problem, RowBatch
from embedq_batch.content.source_columns import LearnedColumns
from embedq_batch.errors import BadSource
from embedq_batch.sources.files import found_files


class _Lines(LearnedColumns):
    """What both have in common: lines become records, and records rows."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns, ids=int)

    def _look(self, lines: Iterable[bytes], source: str) -> None:
        """Check the columns, and learn the types of those that are kept, from the first lines."""
        first = next(blocks(lines, LOOKED_AT, BATCH_BYTES), [])
        records = [record for line in first if not isinstance(record := _record(line), Problem)]
        self._names = sorted({name for record in records for name in record})
        if records:
            self._columns.check(self._names, source)
        if (name := self._columns.id) is not None:
            self._ids = int if all(type(record.get(name)) is int for record in records) else str
        if self._columns.keep:
            self._kept = inferred(records, self._columns.keep, source)

    def _batches(self, lines: Iterator[bytes], rows: RowReader) -> Iterator[RowBatch]:
        for block in blocks(lines, BATCH_ROWS, BATCH_BYTES):
            yield rows.of_records([_record(line) for line in block], self._kept)


class JsonLinesSource(_Lines):
    """One or more files with a JSON object on each line."""

    def __init__(self, paths: Sequence[str], columns: Columns) -> None:
        super().__init__(columns)
        self._paths = paths
        self._files: list[Path] = []

    @property
    def name(self) -> str:
        return ", ".join(self._paths)

    def open(self) -> None:
        self._files = found_files(self._paths)
        self._look(self._all(), str(self._files[0]))

    def count(self) -> int | None:
        return sum(1 for _ in self._all())

    def batches(self) -> Iterator[RowBatch]:
        yield from self._batches(self._all(), RowReader(self._columns, self.ids))

    def _all(self) -> Iterator[bytes]:
        for path in self._files:
            try:
                with open(path, "rb") as file:
                    yield from file
            except OSError as error:
                raise BadSource(source=str(path), reason=error.strerror or str(error)) from None

    def close(self) -> None:
        pass


class StandardInputSource(_Lines):
    """JSON Lines from a stream. What was read is kept in a file without a name: a new model may ask for it again."""

    name = "standard input"

    def __init__(
        self, stream: IO[bytes], columns: Columns, temporary: Callable[[], IO[bytes]] = tempfile.TemporaryFile
    ) -> None:
        super().__init__(columns)
        self._stream = stream
        self._spool = temporary()
        self._ended = False

    def open(self) -> None:
        """Wait for the first lines: their columns are needed before anything is written."""
        for _ in range(LOOKED_AT if self._columns.keep else 1):
            if not (line := self._stream.readline()):
                self._ended = True
                break
            self._spool.write(line)
        self._spool.seek(0)
        self._look(self._spool, self.name)

    def count(self) -> int | None:
        return None

    def batches(self) -> Iterator[RowBatch]:
        yield from self._batches(self._all(), RowReader(self._columns, self.ids))

    def _all(self) -> Iterator[bytes]:
        """First what was read before, then what still comes."""
        self._spool.seek(0)
        yield from iter(self._spool.readline, b"")
        while not self._ended:
            line = self._stream.readline()
            self._ended = not line
            if line:
                self._spool.write(line)
                yield line

    def close(self) -> None:
        self._spool.close()


def blocks(lines: Iterable[bytes], rows: int, size: int) -> Iterator[list[bytes]]:
    """Lines that are not blank, so many together at most, or of about so many bytes."""
    block: list[bytes] = []
    held = 0
    for line in lines:
        if line.isspace():
            continue
        block.append(line)
        held += len(line)
        if len(block) >= rows or held >= size:
            yield block
            block, held = [], 0
    if block:
        yield block


def _record(line: bytes) -> dict[str, Any] | Problem:
    try:
        found = msgspec.json.decode(line)
    except UnicodeDecodeError:
        return Problem("invalid_utf8", "expected UTF-8, got other bytes")
    except (msgspec.DecodeError, RecursionError) as error:
        return Problem("malformed", f"expected a JSON object: {error}")
    if not isinstance(found, dict):
        return Problem("malformed", f"expected a JSON object, got {type(found).__name__}")
    return found
