"""Parquet files, read a batch at a time, never a row group as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.rows import BATCH_ROWS, RowBatch, rows_at_once
from embedq_batch.content.source_columns import ArrowColumns
from embedq_batch.errors import BadSource
from embedq_batch.sources.files import found_files


class ParquetSource(ArrowColumns):
    """One or more Parquet files with the same columns."""

    def __init__(self, paths: Sequence[str], columns: Columns) -> None:
        self._paths = paths
        super().__init__(columns)
        self._files: list[Path] = []
        self._rows = 0

    @property
    def name(self) -> str:
        return ", ".join(self._paths)

    def open(self) -> None:
        self._files = found_files(self._paths)
        self._rows = 0
        for path in self._files:
            try:
                with pq.ParquetFile(path) as file:
                    schema = file.schema_arrow
                    self._rows += file.metadata.num_rows
            except (pa.ArrowInvalid, OSError) as error:
                raise BadSource(source=str(path), reason=str(error)) from None
            self._columns.check(schema.names, str(path))
            if self._schema is None:
                self._schema = schema
            for name in self._columns.names:
                if schema.field(name).type != self._schema.field(name).type:
                    raise BadSource(
                        source=str(path),
                        reason=f"{name}: expected {self._schema.field(name).type}, as in {self._files[0]}, got {schema.field(name).type}",
                    )

    def count(self) -> int | None:
        return self._rows

    def batches(self) -> Iterator[RowBatch]:
        reader = RowReader(self._columns, self.ids)
        for path in self._files:
            try:
                with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                    rows = _rows_at_once(file.metadata, self._columns.names)
                    for batch in file.iter_batches(rows, columns=self._columns.names, use_threads=False):
                        yield reader.of_arrow(batch)
            except (pa.ArrowInvalid, OSError) as error:
                raise BadSource(source=str(path), reason=str(error)) from None

    def close(self) -> None:
        pass


def _rows_at_once(metadata: pq.FileMetaData, names: Sequence[str]) -> int:
    """As many as the longest row group allows. Of texts that are there several times it knows less than they become."""
    found = BATCH_ROWS
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        columns = [group.column(each) for each in range(group.num_columns)]
        size = sum(
            column.total_uncompressed_size for column in columns if _is_in(column.path_in_schema, names)
        )
        found = min(found, rows_at_once(group.num_rows, size))
    return found


def _is_in(path: str, names: Sequence[str]) -> bool:
    """Whether a leaf belongs to one of these columns, which may have several, such as the list that a column may be."""
    return any(path == name or path.startswith(f"{name}.") for name in names)
