"""PostgreSQL with pgvector: a table whose rows are upserted by id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pgvector.psycopg
import psycopg
import pyarrow as pa
from psycopg import sql
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from psycopg.types.json import Jsonb

from embedq_batch.clients import postgresql as binary
from embedq_batch.content.addresses import without_password
from embedq_batch.content.inference import in_json
from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType
from embedq_batch.errors import BadTarget, RowsRefused, TargetAway
from embedq_batch.manifest.place import MANIFEST, in_working_folder
from embedq_batch.sinks.arrow import arrow_schema
from embedq_batch.sinks.sink import PartsRecord

_CONNECT_S: Final = 10
_MARK: Final = "embedq: "
"""What begins the comment of a view, which says what it is of."""
OTHERS: Final = "a view of another maker"
_VIEW_WAIT_MS: Final = 2000
"""How long a switch waits for queries that have the view: those that come meanwhile wait behind it."""
_VIEW_TRIES: Final = 15
_IN_JSON: Final = {
    "bigint": pa.int64(),
    "double precision": pa.float64(),
    "boolean": pa.bool_(),
    "text": pa.string(),
    "jsonb": pa.null(),
}
"""Types of columns as documents have them."""
VECTOR: Final = {"float32": "vector", "float16": "halfvec", "binary": "bit"}


class PostgresSink:
    """A table: `id`, `vector`, `model_version`, `tokens`, and what is kept; with spans `row`, `start` and `end`.

    It is made where it is missing, and pgvector's extension with it. An index is the reader's business.
    """

    dtypes = frozenset[VectorType]({"float32", "float16", "binary"})

    def __init__(self, address: str, table: str) -> None:
        self._address = address
        self._table_name = table
        self._table = sql.Identifier(*table.split("."))
        self._connection: psycopg.Connection[Any] | None = None
        self._shape: Shape | None = None
        self._columns: list[tuple[str, str]] = []
        self._rows_indexed = False
        self._empty = False
        """Whether the table had no rows that these could replace. Then they are copied into it, and not by way of another one."""

    @property
    def name(self) -> str:
        return f"{without_password(self._address)}#{self._table_name}"

    @property
    def manifest(self) -> Path:
        return in_working_folder(self.name) / MANIFEST

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        self._shape = shape
        self._columns = list(_columns(shape))
        try:
            connection = self._connected()
            with connection.transaction():
                columns = sql.SQL(", ").join(
                    sql.SQL("{} {}").format(
                        sql.Identifier(name), sql.SQL(kind + (" primary key" if name == "id" else ""))
                    )
                    for name, kind in self._columns
                )
                connection.execute(sql.SQL("create table if not exists {} ({})").format(self._table, columns))
            self._check(connection)
            found = connection.execute(sql.SQL("select 1 from {} limit 1").format(self._table)).fetchone()
            self._empty = found is None
        except psycopg.Error as error:
            raise BadTarget(target=self.name, reason=said(error)) from None

    def _check(self, connection: psycopg.Connection[Any]) -> None:
        found = self._columns_there(connection)
        for name, kind in self._columns:
            if found.get(name) != kind:
                raise BadTarget(
                    target=self.name, reason=f"column {name}: expected {kind}, got {found.get(name, 'none')}"
                )

    def _columns_there(self, connection: psycopg.Connection[Any]) -> dict[str, str]:
        """The table's columns and their types, in order."""
        rows = connection.execute(
            "select attname, format_type(atttypid, atttypmod) from pg_attribute "
            "where attrelid = to_regclass(%s) and attnum > 0 and not attisdropped order by attnum",
            (self._table.as_string(connection),),
        )
        return dict(rows.fetchall())

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None:
            raise RuntimeError("a table is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        try:
            rows = binary.copied(_fields(self._connected(), batch, self._columns))
            if self._empty:
                try:
                    self._copy(rows)
                    return 0
                except psycopg.errors.UniqueViolation:
                    self._empty = False  # a row comes once more: under a new model, or after a kill
            self._upsert(rows)
        except psycopg.OperationalError as error:
            raise self._away(error) from None
        except psycopg.Error as error:
            raise RowsRefused(target=self.name, reason=said(error)) from None
        except (UnicodeEncodeError, OverflowError) as error:  # another encoding than UTF-8; more than 63 bits
            raise RowsRefused(target=self.name, reason=str(error)) from None
        return 0

    def _copy(self, rows: bytes) -> None:
        connection = self._connected()
        with connection.transaction():
            self._copy_into(connection, self._table, rows)

    def _upsert(self, given: bytes) -> None:
        rows = sql.Identifier("embedq_rows")
        names = sql.SQL(", ").join(sql.Identifier(name) for name, _ in self._columns)
        new = sql.SQL(", ").join(
            sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name))
            for name, _ in self._columns
            if name != "id"
        )
        connection = self._connected()
        with connection.transaction():
            connection.execute(
                sql.SQL("create temp table {} (like {}) on commit drop").format(rows, self._table)
            )
            self._copy_into(connection, rows, given)
            connection.execute(
                sql.SQL(
                    "insert into {0} ({1}) select {1} from {2} on conflict (id) do update set {3}"
                ).format(self._table, names, rows, new)
            )

    def _copy_into(self, connection: psycopg.Connection[Any], table: sql.Identifier, rows: bytes) -> None:
        names = sql.SQL(", ").join(sql.Identifier(name) for name, _ in self._columns)
        into = sql.SQL("copy {} ({}) from stdin (format binary)").format(table, names)
        with connection.cursor() as cursor, cursor.copy(into) as copy:
            copy.write(rows)

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        try:
            connection = self._connected()
            with connection.transaction():
                connection.execute(
                    sql.SQL("delete from {} where id = any(%s)").format(self._table), (list(ids),)
                )
        except psycopg.OperationalError as error:
            raise self._away(error) from None

    def kept_types(self, names: Sequence[str]) -> pa.Schema | None:
        try:
            found = self._columns_there(self._connected())
        except psycopg.Error as error:
            raise BadTarget(target=self.name, reason=said(error)) from None
        known = [(name, _IN_JSON[kind]) for name, kind in found.items() if kind in _IN_JSON]
        return in_json(pa.schema(known), names) if found else None

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        query = sql.SQL('delete from {} where "row" = any(%s) and not id = any(%s)').format(self._table)
        try:
            connection = self._connected()
            if not self._rows_indexed:
                self._index_rows(connection)
            with connection.transaction():
                connection.execute(query, (list(rows), list(but)))
        except psycopg.OperationalError as error:
            raise self._away(error) from None

    def _index_rows(self, connection: psycopg.Connection[Any]) -> None:
        """Find the vectors of a row without reading the table. A table of somebody else is read."""
        name = sql.Identifier(f"{self._table_name.rpartition('.')[2]}_row")
        made_meanwhile = (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateTable)
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege, *made_meanwhile):
            connection.execute(
                sql.SQL('create index if not exists {} on {} ("row")').format(name, self._table)
            )
        self._rows_indexed = True

    def finish(self, record: PartsRecord) -> None:
        pass

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        query = sql.SQL("select id, vector from {} where id = any(%s)").format(self._table)
        return {id: as_floats(vector) for id, vector in self._asked(query, list(ids))}

    def stored(self, version: str | None = None) -> int:
        query = sql.SQL("select count(*) from {} where %s::text is null or model_version = %s")
        rows = self._asked(query.format(self._table), version, version)
        return int(rows[0][0])

    def _asked(self, query: sql.Composed, *arguments: Any) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        try:
            return self._connected().execute(query, arguments).fetchall()
        except psycopg.OperationalError as error:
            raise self._away(error) from None
        except psycopg.Error as error:
            raise BadTarget(target=self.name, reason=said(error)) from None

    def point(self, alias: str) -> str | None:
        """A view of the table, made anew in one transaction: queries wait for it, and none fails. Its owner and the rights to it stay."""
        view = sql.Identifier(*alias.split("."))
        try:
            connection = self._connected()
            for _ in range(_VIEW_TRIES):
                with contextlib.suppress(psycopg.errors.LockNotAvailable):
                    return _switched(connection, view, alias, self._shown(connection), self._mark)
        except psycopg.Error as error:
            raise BadTarget(target=self.name, reason=said(error)) from None
        raise BadTarget(target=alias, reason="queries that do not end keep it: try again when they have")

    @property
    def _mark(self) -> str:
        """What a view of it is of, as it is typed after #."""
        return self._table_name

    def _shown(self, connection: psycopg.Connection[Any]) -> sql.Composed:
        """What a view of it selects."""
        return sql.SQL("select * from {}").format(self._table)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._address, autocommit=True, connect_timeout=_CONNECT_S)
            self._connection.execute("create extension if not exists vector")
            pgvector.psycopg.register_vector(self._connection)
        return self._connection

    def _away(self, error: psycopg.Error) -> TargetAway:
        self.close()
        return TargetAway(target=self.name, reason=said(error))


def _switched(
    connection: psycopg.Connection[Any],
    view: sql.Identifier,
    alias: str,
    query: sql.Composed,
    mark: str,
) -> str | None:
    """Make a view one of this query; what it was of. `mark` says what it is of now.

    Raises:
        BadTarget: the name is no view's.
        LockNotAvailable: queries had it for too long. Nothing is changed, and those that came meanwhile go on.
    """
    with connection.transaction():
        connection.execute(sql.SQL("set local lock_timeout = {}").format(_VIEW_WAIT_MS))
        found = connection.execute(
            "select relkind::text, obj_description(c.oid, 'pg_class'), pg_get_userbyid(relowner) from pg_class c "
            "where c.oid = to_regclass(%s)",
            (view.as_string(connection),),
        ).fetchone()
        if found is not None and found[0] != "v":
            raise BadTarget(target=alias, reason="is a table of its own, not a view that can be switched")
        try:
            with connection.transaction():
                connection.execute(sql.SQL("create or replace view {} as {}").format(view, query))
        except (
            psycopg.errors.InvalidTableDefinition
        ):  # its columns are others, such as vectors of another length
            _replace(connection, view, query, str(found and found[2]))
        comment = sql.Literal(f"{_MARK}{mark}")
        connection.execute(sql.SQL("comment on view {} is {}").format(view, comment))
    return None if found is None else str(found[1] or OTHERS).removeprefix(_MARK)


def _replace(
    connection: psycopg.Connection[Any], view: sql.Identifier, query: sql.Composed, owner: str
) -> None:
    """Drop a view and make it anew, with the owner and the rights that it had."""
    rights = connection.execute(
        "select privilege_type, is_grantable, rolname from pg_class c cross join aclexplode(relacl) "
        "left join pg_roles r on r.oid = grantee where c.oid = to_regclass(%s)",
        (view.as_string(connection),),
    ).fetchall()
    connection.execute(sql.SQL("drop view {}").format(view))
    connection.execute(sql.SQL("create view {} as {}").format(view, query))
    for privilege, grantable, role in rights:
        connection.execute(
            sql.SQL("grant {} on {} to {}{}").format(
                sql.SQL(privilege),
                view,
                sql.SQL("public") if role is None else sql.Identifier(role),
                sql.SQL(" with grant option" if grantable else ""),
            )
        )
    connection.execute(sql.SQL("alter view {} owner to {}").format(view, sql.Identifier(owner)))


def _columns(shape: Shape) -> Iterator[tuple[str, str]]:
    """Names and types, as PostgreSQL writes them."""
    for field in arrow_schema(shape):
        if field.name == "vector":
            yield "vector", f"{VECTOR[shape.dtype]}({shape.dimensions})"
        else:
            yield field.name, _type(field.type)


def _type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "bigint"
    if pa.types.is_floating(kind):
        return "double precision"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_timestamp(kind):
        return "timestamp with time zone" if kind.tz else "timestamp without time zone"
    if pa.types.is_decimal(kind):
        return "numeric"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytea"
    if pa.types.is_date(kind):
        return "date"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "jsonb"


def _fields(
    connection: psycopg.Connection[Any], batch: VectorBatch, columns: Sequence[tuple[str, str]]
) -> list[binary.Fixed | binary.Values]:
    """The columns of a table, as they are copied.

    Raises:
        psycopg.Error, UnicodeEncodeError, OverflowError: the table cannot hold a value.
    """
    ours: dict[str, Any] = {"id": batch.ids, "tokens": batch.tokens}
    if batch.rows is not None and batch.spans is not None:
        ours |= {"row": batch.rows, "start": batch.spans[:, 0], "end": batch.spans[:, 1]}
    found: list[binary.Fixed | binary.Values] = []
    for name, kind in columns:
        if name == "vector":
            found.append(binary.vectors(batch.vectors))
        elif name == "model_version":
            [version] = values_in_binary(connection, kind, [batch.model_version])
            found.append(binary.same(bytes(version or b""), len(batch)))
        elif name in ours:
            values = ours[name]
            found.append(
                binary.integers(values) if kind == "bigint" else values_in_binary(connection, kind, values)
            )
        elif batch.kept is not None:
            found.append(_kept(connection, kind, batch.kept.column(name)))
    return found


def _kept(connection: psycopg.Connection[Any], kind: str, column: pa.Array) -> binary.Fixed | binary.Values:
    """A column that goes along."""
    if kind == "bigint" and not column.null_count and pa.types.is_signed_integer(column.type):
        return binary.integers(column.to_numpy(zero_copy_only=False))
    values = column.to_pylist()
    if kind == "jsonb":
        values = [None if value is None else Jsonb(value, dumps=_json) for value in values]
    return values_in_binary(connection, kind, values)


def values_in_binary(connection: psycopg.Connection[Any], kind: str, values: Sequence[Any]) -> binary.Values:
    """Values as psycopg sends this type in binary, all at once."""
    transformer = Transformer(connection)
    oid = connection.adapters.types.get_oid(kind)
    transformer.set_dumper_types([oid] * len(values), Format.BINARY)
    return transformer.dump_sequence(values, [PyFormat.BINARY] * len(values))


def _json(value: Any) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)


def as_floats(vector: Any) -> npt.NDArray[np.float32]:
    if hasattr(vector, "to_numpy"):
        return np.asarray(vector.to_numpy(), np.float32)
    if isinstance(vector, str):  # bits
        return np.array([each == "1" for each in vector], np.float32)
    return np.asarray(vector, np.float32)


def said(error: psycopg.Error) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
