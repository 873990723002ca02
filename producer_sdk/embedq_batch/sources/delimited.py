"""CSV and TSV files. Every column is text: a type that is guessed from the first rows is wrong in the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.csv as pacsv

from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.rows import BATCH_ROWS, RowBatch
from embedq_batch.errors import BadSource
from embedq_batch.sources.files import found_files

_BLOCK: Final = 4 << 20
"""Bytes that are parsed at once; no row may be longer."""


class DelimitedSource:
    """One or more files of columns, whose first line names them. An empty field is an empty text, or a missing one where it
    was not in quotes and is an id."""

    latest_wins = False

    def __init__(self, paths: Sequence[str], columns: Columns, *, delimiter: str = ",") -> None:
        self._paths = paths
        self._columns = columns
        self._delimiter = delimiter
        self._files: list[Path] = []

    @property
    def name(self) -> str:
        return ", ".join(self._paths)

    @property
    def kept(self) -> pa.Schema | None:
        return pa.schema([(name, pa.string()) for name in self._columns.keep]) if self._columns.keep else None

    @property
    def ids(self) -> type[str | int]:
        return int if self._columns.id is None else str

    def open(self) -> None:
        self._files = found_files(self._paths)
        for path in self._files:
            with self._reader(path, names=False) as reader:
                self._columns.check(reader.schema.names, str(path))

    def count(self) -> int | None:
        """The files' lines, but for the first: a few too many where texts have line breaks."""
        lines = 0
        for path in self._files:
            with open(path, "rb") as file:
                lines += max(0, sum(1 for _ in file) - 1)
        return lines

    def batches(self) -> Iterator[RowBatch]:
        rows = RowReader(self._columns, self.ids)
        for path in self._files:
            try:
                with self._reader(path) as reader:
                    for block in reader:
                        for start in range(0, block.num_rows, BATCH_ROWS):
                            yield rows.of_arrow(block.slice(start, BATCH_ROWS))
            except pa.ArrowInvalid as error:
                raise BadSource(source=str(path), reason=str(error)) from None

    def _reader(self, path: Path, *, names: bool = True) -> pacsv.CSVStreamingReader:
        types = {name: pa.string() for name in self._columns.names}
        try:
            return pacsv.open_csv(
                path,
                read_options=pacsv.ReadOptions(block_size=_BLOCK, use_threads=False),
                parse_options=pacsv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                convert_options=pacsv.ConvertOptions(
                    check_utf8=False,
                    column_types=types,
                    include_columns=self._columns.names if names else None,
                    strings_can_be_null=False,
                ),
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise BadSource(source=str(path), reason=str(error)) from None

    def close(self) -> None:
        pass
