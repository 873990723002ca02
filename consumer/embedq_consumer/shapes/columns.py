"""Columns of a flat result: their types, and their values as those types have them. Pure.

Where the source came with a schema, a column keeps its own; where the mapping names a type, it gets that; otherwise the value
decides.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from embedq_consumer.shapes.mapping import ColumnType
from embedq_consumer.shapes.rows import BadRow, ConnectSchema, named

_INT32: Final = range(-(2**31), 2**31)
_INT64: Final = range(-(2**63), 2**63)
_SCALARS: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "boolean": (bool,),
    "int8": (int,),
    "int16": (int,),
    "int32": (int,),
    "int64": (int,),
    "float": (int, float),
    "double": (int, float),
    "bytes": (bytes, str),
}
"""The Python types of each of Connect's scalar types. Bytes in JSON are base64 text."""
_NESTED: Final = frozenset({"struct", "array", "map"})
_EXPECTED: Final[Mapping[ColumnType, str]] = {
    "string": "a string",
    "boolean": "a boolean",
    "int32": "an integer of 32 bits",
    "int64": "an integer of 64 bits",
    "float": "a number",
    "double": "a number",
    "json": "any value",
}


class TypedColumn(msgspec.Struct, frozen=True):
    """A column of a result: its name there, its type as Connect writes it, and its value, bytes among them as bytes."""

    name: str
    schema: ConnectSchema
    value: Any


def plain(value: Any) -> Any:
    """A value as JSON has it: bytes, which Avro and MessagePack know, as base64."""
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def typed(
    name: str, value: Any, schema: ConnectSchema | None, declared: ColumnType | None, *, nested: bool
) -> TypedColumn:
    """A column with its type. `nested`: the output takes objects and lists as they are; else they become JSON text.

    Raises:
        BadRow: the value is not of the column's type.
    """
    if declared is not None:
        return TypedColumn(name, _optional(_type_name(declared)), _converted(name, value, declared))
    if schema is not None and (known := _by_schema(value, schema, nested=nested)) is not None:
        return TypedColumn(name, *known)
    return TypedColumn(name, *_inferred(name, value))


def as_text(value: Any) -> str:
    """An object or a list as JSON text."""
    return msgspec.json.encode(plain(value)).decode()


def _by_schema(value: Any, schema: ConnectSchema, *, nested: bool) -> tuple[ConnectSchema, Any] | None:
    """The column as its source describes it; None if that does not fit the value."""
    kind = schema.get("type")
    if isinstance(kind, str) and kind in _NESTED:
        if nested:
            return {**schema, "optional": True}, plain(value)
        return _optional("string"), None if value is None else as_text(value)
    if not isinstance(kind, str) or kind not in _SCALARS:
        return None
    if value is not None:
        if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return None
        if isinstance(value, int) and kind.startswith("int") and value not in _INT64:
            return None
    # Its default is the source's business: a result without the column has none.
    return {**{key: inner for key, inner in schema.items() if key != "default"}, "optional": True}, value


def _inferred(name: str, value: Any) -> tuple[ConnectSchema, Any]:
    if value is None or isinstance(value, str):
        return _optional("string"), value
    if isinstance(value, bool):
        return _optional("boolean"), value
    if isinstance(value, int):
        if value not in _INT64:
            raise BadRow("invalid_value", f"`{named(name)}`: expected an integer of 64 bits", named(name))
        return _optional("int64"), value
    if isinstance(value, float):
        return _optional("double"), value
    if isinstance(value, bytes):
        return _optional("bytes"), value
    return _optional("string"), as_text(value)


def _converted(name: str, value: Any, declared: ColumnType) -> Any:
    if value is None:
        return None
    if declared == "json":
        return as_text(value)
    fits = isinstance(value, _SCALARS[declared]) and (declared == "boolean" or not isinstance(value, bool))
    if fits and declared in ("int32", "int64"):
        fits = value in (_INT32 if declared == "int32" else _INT64)
    if not fits:
        raise BadRow("invalid_value", f"`{named(name)}`: expected {_EXPECTED[declared]}", named(name))
    return float(value) if declared in ("float", "double") else value


def _type_name(declared: ColumnType) -> str:
    return "string" if declared == "json" else declared


def _optional(kind: str) -> ConnectSchema:
    return {"type": kind, "optional": True}
