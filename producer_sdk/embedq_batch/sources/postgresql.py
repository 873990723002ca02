"""PostgreSQL: a table, or a query, read through a cursor of the server's, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from embedq_batch.content.addresses import without_password
from embedq_batch.content.columns import Columns, RowReader
from embedq_batch.content.inference import LOOKED_AT, inferred
from embedq_batch.content.rows import BATCH_BYTES, RowBatch, rows_at_once
from embedq_batch.content.source_columns import LearnedColumns
from embedq_batch.errors import BadSource

_CONNECT_S: Final = 10
_FIRST_ROWS: Final = 64
"""Before it is known how long rows are."""
_INTEGERS: Final = frozenset({20, 21, 23})
"""The types int8, int2 and int4, by PostgreSQL's own numbers."""


class PostgresSource(LearnedColumns):
    """A table, or the rows of a query. Each pass is one transaction: it sees the table as it was when it began."""

    def __init__(
        self, address: str, columns: Columns, *, table: str | None = None, query: str | None = None
    ) -> None:
        self._address = address
        super().__init__(columns, ids=int)
        self._table = table
        self._query = query

    @property
    def name(self) -> str:
        what = self._table if self._query is None else self._query
        return f"{without_password(self._address)}#{what}"

    def open(self) -> None:
        try:
            with self._connected() as connection, connection.cursor("embedq_look") as cursor:
                if self._table is not None:
                    all_of_it = sql.SQL("select * from {} limit 0").format(self._identifier())
                    there = connection.execute(all_of_it).description or ()
                    self._columns.check([each.name for each in there], self.name)
                    # A type that psycopg does not know, such as a vector, is not taken along by itself.
                    known = connection.adapters.types
                    self._names = [each.name for each in there if known.get(each.type_code) is not None]
                cursor.execute(self._selected())
                records = self._some(cursor)
                found = {column.name: column.type_code for column in cursor.description or ()}
        except psycopg.Error as error:
            raise self._failed(error) from None
        self._names = self._names or list(found)
        self._columns.check(list(found), self.name)
        if self._columns.id is not None:
            self._ids = int if found[self._columns.id] in _INTEGERS else str
        if self._columns.keep:
            self._kept = inferred(records, self._columns.keep, self.name)

    def count(self) -> int | None:
        """The planner's guess for a table, if there is one; counting would read all of it."""
        if self._table is None:
            return None
        try:
            with self._connected() as connection:
                row = connection.execute(
                    "select reltuples::bigint as count from pg_class where oid = to_regclass(%s)",
                    (self._table,),
                ).fetchone()
        except psycopg.Error:
            return None
        return row["count"] if row is not None and row["count"] > 0 else None

    def batches(self) -> Iterator[RowBatch]:
        reader = RowReader(self._columns, self._ids)
        try:
            with self._connected() as connection, connection.cursor("embedq_rows") as cursor:
                cursor.execute(self._selected())
                rows = _FIRST_ROWS
                while records := cursor.fetchmany(rows):
                    yield reader.of_records(records, self._kept)
                    rows = rows_at_once(len(records), sum(map(_size, records)))
        except psycopg.Error as error:
            raise self._failed(error) from None

    def close(self) -> None:
        pass

    def _some(self, cursor: psycopg.ServerCursor[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first rows, as many as are looked at, or fewer long ones."""
        found: list[dict[str, Any]] = []
        size = 0
        while len(found) < LOOKED_AT and size < BATCH_BYTES and (more := cursor.fetchmany(_FIRST_ROWS)):
            found += more
            size += sum(map(_size, more))
        return found[:LOOKED_AT]

    def _connected(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self._address, connect_timeout=_CONNECT_S, row_factory=dict_row)

    def _selected(self) -> sql.SQL | sql.Composed:
        if self._query is not None:
            return sql.SQL(self._query)
        names = sql.SQL(", ").join(map(sql.Identifier, self._columns.names))
        return sql.SQL("select {} from {}").format(names, self._identifier())

    def _identifier(self) -> sql.Identifier:
        return sql.Identifier(*str(self._table).split("."))

    def _failed(self, error: psycopg.Error) -> BadSource:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        return BadSource(source=self.name, reason=said)


def _size(record: dict[str, Any]) -> int:
    """Of its texts and bytes, which alone may be long."""
    return sum(len(value) for value in record.values() if isinstance(value, str | bytes))
