"""What sources that are stores have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.inference import inferred
from embedq_batch.content.rows import RowBatch
from embedq_batch.content.source_columns import LearnedColumns


def identified(columns: Columns, names: Sequence[str]) -> Columns:
    """Which column tells a store's rows apart, where nobody says: `id`, or `row` where each row has several vectors.

    Their number does not: a store gives its rows in any order.
    """
    if columns.id is not None:
        return columns
    return msgspec.structs.replace(columns, id="row" if "row" in names else "id")


class StoredRecords(LearnedColumns):
    """Rows of a store whose records have fields of any kind. What they are is learned from the first ones."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns, ids=str)

    def _look(self, records: Sequence[Mapping[str, Any]], source: str) -> None:
        self._names = list(dict.fromkeys(name for record in records for name in record))
        self._columns = identified(self._columns, self._names)
        if records:
            self._columns.check(self._names, source)
        ids = [record.get(str(self._columns.id)) for record in records]
        self._ids = int if ids and all(type(id) is int for id in ids) else str
        if self._columns.keep:
            self._kept = inferred(records, self._columns.keep, source)

    def _rows(self, pages: Iterator[Sequence[Mapping[str, Any]]]) -> Iterator[RowBatch]:
        reader = RowReader(self._columns, self._ids)
        for records in pages:
            yield reader.of_records(records, self._kept)
