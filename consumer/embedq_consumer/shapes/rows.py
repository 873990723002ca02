"""A row as every shape comes down to: columns by name, what is known of their types, and how a path finds one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from embedq_shared.messages import MAX_NESTING, ErrorCode

ConnectSchema = Mapping[str, Any]
"""A schema as Kafka Connect's JsonConverter writes it: `type`, `optional`, `fields`, `items`, `name`, …"""

UNAVAILABLE: Final = "__debezium_unavailable_value"
"""What Debezium writes in place of a large column that an update did not touch (PostgreSQL's TOAST without REPLICA IDENTITY FULL)."""
_LONGEST_NAME: Final = 64
"""Characters of a field's name in an error."""


class BadRow(Exception):
    """A record that its mapping cannot read. The message names the field, and repeats no value.

    `id` is the row's, where that could still be read.
    """

    def __init__(
        self, code: ErrorCode, message: str, param: str | None = None, *, id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.param = param
        self.id = id


class Missing:
    """What a path leads to that is not there."""


MISSING: Final = Missing()


class Decoded(msgspec.Struct, frozen=True):
    """A record's value or key without its encoding, and its schema where it came with one."""

    value: Any
    schema: ConnectSchema | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `schemas` has what is known of its columns' types; `id` is the row's by its shape's own rule."""

    fields: Mapping[str, Any]
    schemas: Mapping[str, ConnectSchema] = {}
    id: str | None = None

    def get(self, path: str) -> Any:
        """The value at a path such as `title` or `author.name`; a field of the whole name comes first. `MISSING` if there is
        none.

        Raises:
            BadRow: the source left the value out.
        """
        found = _at(self.fields, path)
        if isinstance(found, str) and found == UNAVAILABLE:
            raise BadRow(
                "invalid_value",
                f"`{named(path)}`: expected the column's value, got Debezium's mark for a large one that did not change; "
                "set the table's REPLICA IDENTITY to FULL",
                named(path),
            )
        return found

    def schema(self, path: str) -> ConnectSchema | None:
        """What is known of the type of the column of this name."""
        return self.schemas.get(path)


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """The row is gone. `before` is what it was, where the record says so."""

    before: Row | None = None


def named(path: str) -> str:
    """A field's name as an error says it."""
    return path if len(path) <= _LONGEST_NAME else path[:_LONGEST_NAME] + "…"


def object_of(value: Any, what: str, param: str | None = None) -> dict[str, Any]:
    """The value, which must be an object with text for keys.

    Raises:
        BadRow: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadRow("malformed" if param is None else "invalid_value", f"{what}: expected an object", param)
    return value


def bounded(value: Any, what: str, depth: int = 1) -> Any:
    """The value, which nests no deeper than a job may.

    Raises:
        BadRow: it does.
    """
    if isinstance(value, dict | list):
        if depth > MAX_NESTING:
            raise BadRow("malformed", f"{what}: expected nesting of at most {MAX_NESTING} levels")
        for inner in value.values() if isinstance(value, dict) else value:
            bounded(inner, what, depth + 1)
    return value


def schemas_of(schema: ConnectSchema | None) -> dict[str, ConnectSchema]:
    """The schemas of a struct's fields, by name. Empty for anything else: a schema is a help, and its faults cost no row."""
    found: dict[str, ConnectSchema] = {}
    fields = schema.get("fields") if isinstance(schema, Mapping) else None
    for field in fields if isinstance(fields, list | tuple) else ():
        if isinstance(field, Mapping) and isinstance(field.get("field"), str) and "type" in field:
            found[field["field"]] = {key: value for key, value in field.items() if key != "field"}
    return found


def _at(fields: Mapping[str, Any], path: str) -> Any:
    if path in fields:
        return fields[path]
    head, dot, rest = path.partition(".")
    while dot:
        inner = fields.get(head)
        if isinstance(inner, Mapping):
            return _at(inner, rest)
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return MISSING
