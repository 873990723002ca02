"""The schemas of flat results: Connect's own, and those that are registered as Avro, JSON Schema or Protobuf. Pure."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping as Map
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from embedq_consumer.shapes.columns import TypedColumn, as_text
from embedq_consumer.shapes.mapping import Output, OutputFormat, VectorForm
from embedq_consumer.shapes.registry.schemas import Registration, SchemaKind
from embedq_consumer.shapes.rows import BadRow, ConnectSchema, named

KIND: Final[Map[OutputFormat, SchemaKind]] = {"avro": "AVRO", "json-schema": "JSON", "protobuf": "PROTOBUF"}
VECTOR: Final[Map[VectorForm, ConnectSchema]] = {
    "array": {"type": "array", "items": {"type": "float", "optional": False}, "optional": False},
    "text": {"type": "string", "optional": False},
    "base64": {"type": "bytes", "optional": False},
}
_SCHEMA_NAME: Final = "embedq.Embedding"
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEPT_SCHEMAS: Final = 256
"""Parsed ones; a mapping has one, or one for each set of columns that its rows have."""


def connect_schema(output: Output, members: Sequence[TypedColumn]) -> ConnectSchema:
    """As JsonConverter wants it beside the payload."""
    fields = [{**member.schema, "field": member.name} for member in members]
    fields.append({**VECTOR[output.vector_form], "field": output.vector})
    return {"type": "struct", "name": _SCHEMA_NAME, "optional": False, "fields": fields}


def registration_of(output: Output, members: Sequence[TypedColumn]) -> Registration:
    """What is registered for results of these members, by the strategy of topic names.

    Raises:
        BadRow: a column's name is none that the format takes.
    """
    every = [*members, TypedColumn(output.vector, VECTOR[output.vector_form], None)]
    if output.format != "json-schema":
        for one in every:
            if not _NAME.fullmatch(one.name):
                raise BadRow(
                    "invalid_value",
                    f"`{named(one.name)}`: expected a name of letters, digits and underscores in {output.format}; give the "
                    "column another one in the mapping's `columns`",
                    named(one.name),
                )
    makers = {"avro": _avro_schema, "json-schema": _json_schema, "protobuf": _protobuf_schema}
    return Registration(f"{output.topic}-value", KIND[output.format], makers[output.format](every))


# -- Avro --------------------------------------------------------------------------------------------------------------

_AVRO_TYPES: Final = {
    "int8": "int",
    "int16": "int",
    "int32": "int",
    "int64": "long",
    "float": "float",
    "double": "double",
    "boolean": "boolean",
    "string": "string",
    "bytes": "bytes",
}


def _avro_schema(members: Sequence[TypedColumn]) -> str:
    namespace, _, name = _SCHEMA_NAME.rpartition(".")
    fields: list[dict[str, Any]] = []
    for member in members:
        kind = _avro_type(member.schema)
        if member.schema.get("optional"):
            fields.append({"name": member.name, "type": ["null", kind], "default": None})
        else:
            fields.append({"name": member.name, "type": kind})
    return json.dumps({"type": "record", "namespace": namespace, "name": name, "fields": fields})


def _avro_type(schema: ConnectSchema) -> Any:
    if schema["type"] == "array":
        return {"type": "array", "items": _AVRO_TYPES[schema["items"]["type"]]}
    kind = _AVRO_TYPES.get(schema["type"], "string")
    if name := schema.get("name"):
        found: dict[str, Any] = {"type": kind, "connect.name": name}
        if "version" in schema:
            found["connect.version"] = schema["version"]
        if "parameters" in schema:
            found["connect.parameters"] = schema["parameters"]
        return found
    return kind


@lru_cache(maxsize=_KEPT_SCHEMAS)
def _parsed_avro(text: str) -> Any:
    import fastavro

    return fastavro.parse_schema(json.loads(text))


def encode_avro(schema: str, members: Sequence[TypedColumn]) -> bytes:
    """One result in Avro."""
    import fastavro

    stream = io.BytesIO()
    record = {member.name: _bytes_or(member) for member in members}
    fastavro.schemaless_writer(stream, _parsed_avro(schema), record)
    return stream.getvalue()


def _bytes_or(member: TypedColumn) -> Any:
    """The value; bytes that came as base64 text are bytes here, and what nests is text."""
    if member.schema["type"] == "bytes" and isinstance(member.value, str):
        return base64.b64decode(member.value, validate=True)
    if isinstance(member.value, dict):
        return as_text(member.value)
    return member.value


# -- JSON Schema -------------------------------------------------------------------------------------------------------

_JSON_TYPES: Final = {"boolean": "boolean", "float": "number", "double": "number"}


def _json_schema(members: Sequence[TypedColumn]) -> str:
    properties = {member.name: _json_type(member.schema) for member in members}
    required = [member.name for member in members if not member.schema.get("optional")]
    return json.dumps(
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": _SCHEMA_NAME,
            "type": "object",
            "properties": properties,
            "required": required,
        }
    )


def _json_type(schema: ConnectSchema) -> dict[str, Any]:
    kind = schema["type"]
    if kind == "array":
        return {"type": "array", "items": {"type": "number", "connect.type": schema["items"]["type"]}}
    name = "integer" if kind.startswith("int") else _JSON_TYPES.get(kind, "string")
    found: dict[str, Any] = {"type": name}
    if kind not in ("string", "boolean"):
        found["connect.type"] = kind
    return {"oneOf": [{"type": "null"}, found]} if schema.get("optional") else found


# -- Protobuf ----------------------------------------------------------------------------------------------------------

_FIRST_COLUMN: Final = 16
"""A field's number is its place among the columns, so these have an order and room before them for the result's own."""
_PROTOBUF_TYPES: Final = {
    "int8": 5,
    "int16": 5,
    "int32": 5,
    "int64": 3,
    "float": 2,
    "double": 1,
    "boolean": 8,
    "string": 9,
    "bytes": 12,
}
"""By `FieldDescriptorProto.Type`."""


def _protobuf_schema(members: Sequence[TypedColumn]) -> str:
    """A serialized descriptor in base64, which registries take for a schema's text."""
    from google.protobuf import descriptor_pb2

    package, _, name = _SCHEMA_NAME.rpartition(".")
    file = descriptor_pb2.FileDescriptorProto(name="embedding.proto", package=package, syntax="proto3")
    message = file.message_type.add(name=name)
    own, column = 0, _FIRST_COLUMN
    for member in members:
        optional = bool(member.schema.get("optional"))
        number = column if optional else own + 1
        own, column = (own, column + 1) if optional else (own + 1, column)
        repeated = member.schema["type"] == "array"
        kind = member.schema["items"]["type"] if repeated else member.schema["type"]
        field = message.field.add(
            name=member.name, number=number, type=_PROTOBUF_TYPES.get(kind, 9), label=3 if repeated else 1
        )
        if optional:
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{member.name}")
    return base64.b64encode(file.SerializeToString(deterministic=True)).decode("ascii")


@lru_cache(maxsize=_KEPT_SCHEMAS)
def _message_class(schema: str) -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto()
    file.ParseFromString(base64.b64decode(schema))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(_SCHEMA_NAME))


def encode_protobuf(schema: str, members: Sequence[TypedColumn]) -> bytes:
    """One result in Protobuf."""
    values = {member.name: _bytes_or(member) for member in members}
    message = _message_class(schema)(**{name: value for name, value in values.items() if value is not None})
    return bytes(message.SerializeToString())
