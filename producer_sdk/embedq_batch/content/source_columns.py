"""What a source says of its columns once it is open: learned from its first rows, or told by its Arrow schema."""

from __future__ import annotations

import pyarrow as pa

from embedq_batch.content.columns import Columns


class LearnedColumns:
    """Of a source that looks at its first rows, and notes what it finds in `_names`, `_kept` and `_ids`."""

    latest_wins = False

    def __init__(self, columns: Columns, ids: type[str | int]) -> None:
        """`ids`: what they are as long as nothing else was found."""
        self._columns = columns
        self._kept: pa.Schema | None = None
        self._ids = ids
        self._names: list[str] = []

    @property
    def names(self) -> list[str]:
        """Of all columns."""
        return self._names

    @property
    def kept(self) -> pa.Schema | None:
        """The columns that are taken along."""
        return self._kept

    @property
    def ids(self) -> type[str | int]:
        """What tells its rows apart."""
        return self._ids


class ArrowColumns:
    """Of a source whose Arrow schema, noted in `_schema`, tells."""

    latest_wins = False

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._schema: pa.Schema | None = None

    @property
    def names(self) -> list[str]:
        """Of all columns."""
        return [] if self._schema is None else self._schema.names

    @property
    def kept(self) -> pa.Schema | None:
        """The columns that are taken along."""
        if self._schema is None or not self._columns.keep:
            return None
        return pa.schema([self._schema.field(name) for name in self._columns.keep])

    @property
    def ids(self) -> type[str | int]:
        """What tells its rows apart: whole numbers, where nothing does but their place."""
        if self._columns.id is None or self._schema is None:
            return int
        return int if pa.types.is_integer(self._schema.field(self._columns.id).type) else str
