"""LanceDB: a table, as it is when a pass over it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lancedb
import pyarrow as pa

from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.rows import BATCH_ROWS, RowBatch
from embedq_batch.content.source_columns import ArrowColumns
from embedq_batch.content.stored import identified
from embedq_batch.errors import BadSource


class LanceSource(ArrowColumns):
    """A table of a LanceDB database: a folder, or an address that LanceDB knows (s3://…)."""

    def __init__(self, place: str, table: str, columns: Columns) -> None:
        self._place = place
        self._table_name = table
        super().__init__(columns)

    @property
    def name(self) -> str:
        return f"lancedb:{self._place}#{self._table_name}"

    def open(self) -> None:
        self._schema = self._table().schema
        self._columns = identified(self._columns, self._schema.names)
        self._columns.check(self._schema.names, self.name)

    def count(self) -> int | None:
        return int(self._table().count_rows())

    def batches(self) -> Iterator[RowBatch]:
        reader = RowReader(self._columns, self.ids)
        try:
            for batch in self._table().search().select(self._columns.names).to_batches(BATCH_ROWS):
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield reader.of_arrow(batch.slice(start, BATCH_ROWS))
        except (OSError, RuntimeError, pa.ArrowInvalid) as error:
            raise BadSource(source=self.name, reason=str(error)) from None

    def close(self) -> None:
        pass

    def _table(self) -> Any:
        try:
            return lancedb.connect(self._place).open_table(self._table_name)
        except (OSError, RuntimeError, ValueError) as error:
            raise BadSource(source=self.name, reason=str(error)) from None
