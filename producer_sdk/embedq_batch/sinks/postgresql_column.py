"""PostgreSQL with pgvector: a column of a table that is there already, beside its texts or beside the vectors of another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from embedq_batch.clients import postgresql as binary
from embedq_batch.content.rows import RowId, Shape, VectorBatch
from embedq_batch.errors import BadTarget, RowsRefused
from embedq_batch.sinks.postgresql import VECTOR, PostgresSink, as_floats, said, values_in_binary
from embedq_batch.sinks.sink import PartsRecord

VERSION: Final = "_model_version"
"""What the name of the column ends with that says which model made a vector."""
_VECTORS: Final = ["vector", "halfvec", "sparsevec", "bit"]


class PostgresColumnSink(PostgresSink):
    """The column `NAME` of vectors and the column `NAME_model_version`, which are made where they are missing. A row is known by the
    table's primary key, of one column, and one that is not in the table is passed; a row that is deleted loses its vector alone.
    """

    def __init__(self, address: str, table: str, column: str) -> None:
        super().__init__(address, table)
        self._column_name = column
        self._column = sql.Identifier(column)
        self._version = sql.Identifier(f"{column}{VERSION}")
        self._key: tuple[sql.Identifier, sql.SQL] | None = None

    @property
    def name(self) -> str:
        return f"{super().name}:{self._column_name}"

    @property
    def _mark(self) -> str:
        return f"{self._table_name}:{self._column_name}"

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        if shape.spans or shape.kept:
            reason = "a column has one vector of each row, and its table has its columns: neither --chunk late nor --keep"
            raise BadTarget(target=self.name, reason=reason)
        self._shape = shape
        kind = f"{VECTOR[shape.dtype]}({shape.dimensions})"
        try:
            connection = self._connected()
            for name, its in ((self._column_name, kind), (f"{self._column_name}{VERSION}", "text")):
                if name not in self._columns_there(
                    connection
                ):  # a look alone: adding one waits for all who read the table
                    connection.execute(
                        sql.SQL("alter table {} add column if not exists {} {}").format(
                            self._table, sql.Identifier(name), sql.SQL(its)
                        )
                    )
            found = self._columns_there(connection)
            self._primary_key()
        except psycopg.Error as error:
            raise BadTarget(target=self.name, reason=said(error)) from None
        if found.get(self._column_name) != kind:
            raise BadTarget(
                target=self.name,
                reason=f"column {self._column_name}: expected {kind}, got {found.get(self._column_name, 'none')}",
            )

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None:
            raise RuntimeError("a column is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        try:
            connection = self._connected()
            names = self._names()
            # A key has whatever type it has, and is text on the way.
            keys = values_in_binary(connection, "text", list(map(str, batch.ids)))
            rows = binary.copied([keys, binary.vectors(batch.vectors)])
            with connection.transaction():
                connection.execute(
                    sql.SQL(
                        "create temp table embedq_rows on commit drop as select ''::text as id, {c} as vector from {t} limit 0"
                    ).format(**names)
                )
                with (
                    connection.cursor() as cursor,
                    cursor.copy("copy embedq_rows from stdin (format binary)") as copy,
                ):
                    copy.write(rows)
                connection.execute(
                    sql.SQL(
                        "update {t} set {c} = embedq_rows.vector, {v} = %s from embedq_rows where {t}.{k} = embedq_rows.id::{kind}"
                    ).format(**names),
                    (batch.model_version,),
                )
        except psycopg.OperationalError as error:
            raise self._away(error) from None
        except psycopg.Error as error:
            raise RowsRefused(target=self.name, reason=said(error)) from None
        except UnicodeEncodeError as error:  # a database of another encoding than UTF-8
            raise RowsRefused(target=self.name, reason=str(error)) from None
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        query = sql.SQL("update {t} set {c} = null, {v} = null where {k} = any(%s::{kind}[])")
        try:
            self._connected().execute(query.format(**self._names()), (list(map(str, ids)),))
        except psycopg.OperationalError as error:
            raise self._away(error) from None

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        query = sql.SQL("select {k}::text, {c} from {t} where {k} = any(%s::{kind}[]) and {c} is not null")
        found = dict(self._asked(query.format(**self._names()), list(map(str, ids))))
        return {id: as_floats(found[str(id)]) for id in ids if str(id) in found}

    def stored(self, version: str | None = None) -> int:
        query = sql.SQL("select count(*) from {t} where {c} is not null and (%s::text is null or {v} = %s)")
        return int(self._asked(query.format(**self._names()), version, version)[0][0])

    def _shown(self, connection: psycopg.Connection[Any]) -> sql.Composed:
        """The table's columns without vectors, and these: `vector`, `model_version`, as a table of ours has them."""
        others = [
            name
            for name, kind in self._columns_there(connection).items()
            if kind.partition("(")[0] not in _VECTORS and not name.endswith(VERSION) and name != VERSION[1:]
        ]
        return sql.SQL("select {}, {} as vector, {} as model_version from {}").format(
            sql.SQL(", ").join(map(sql.Identifier, others)), self._column, self._version, self._table
        )

    def _names(self) -> dict[str, sql.Composable]:
        """What queries are made of: the table, its key and the key's type, the column of vectors and that of versions."""
        key, kind = self._primary_key()
        return {"t": self._table, "k": key, "kind": kind, "c": self._column, "v": self._version}

    def _primary_key(self) -> tuple[sql.Identifier, sql.SQL]:
        if self._key is None:
            connection = self._connected()
            rows = connection.execute(
                "select attname, format_type(atttypid, atttypmod) from pg_index join pg_attribute on "
                "attrelid = indrelid and attnum = any(indkey) where indisprimary and indrelid = to_regclass(%s)",
                (self._table.as_string(connection),),
            ).fetchall()
            if len(rows) != 1:
                there = ", ".join(name for name, _ in rows) or "none"
                raise BadTarget(target=self.name, reason=f"expected a primary key of one column, got {there}")
            self._key = sql.Identifier(rows[0][0]), sql.SQL(rows[0][1])
        return self._key
