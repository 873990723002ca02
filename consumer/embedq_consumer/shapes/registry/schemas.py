"""What a Schema Registry is asked for, and what readers make of its schemas. Needs the extra `schema-registry`, when it is used."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec

from embedq_consumer.shapes.envelopes import json_of
from embedq_consumer.shapes.registry.wire_format import Framed, message_indexes
from embedq_consumer.shapes.rows import BadRow, ConnectSchema, Decoded

SchemaKind = Literal["AVRO", "JSON", "PROTOBUF"]
"""As registries name them."""

_DEEPEST: Final = 32
"""Levels of a schema that are looked at; what lies deeper has no type of its own here."""


class Fetch(msgspec.Struct, frozen=True):
    """The schema of this number or GUID."""

    schema: int | str


class Registration(msgspec.Struct, frozen=True):
    """The number that a schema has, or gets, under a subject."""

    subject: str
    kind: SchemaKind
    text: str


Want = Fetch | Registration


class Refused(msgspec.Struct, frozen=True):
    """The registry is there, and has no such schema or does not take it."""

    reason: str
    may_come: bool = False
    """It may be there a moment later."""


class Reader(Protocol):
    """Reads values that were written by one schema."""

    def read(self, framed: Framed) -> Decoded:
        """The value; raises BadRow."""


class Schemas(Protocol):
    """What is known of schemas now. Neither call waits."""

    def reader(self, want: Fetch) -> Reader | Refused | None:
        """Who reads such values; None if the registry must be asked first."""

    def number(self, want: Registration) -> int | Refused | None:
        """The schema's number; None if the registry must be asked first."""


class NoRegistry:
    """Where no Schema Registry is set."""

    def reader(self, want: Fetch) -> Refused:
        """Nobody."""
        return Refused("the setting `schema_registry_url` names no Schema Registry")

    def number(self, want: Registration) -> Refused:
        """None."""
        return self.reader(Fetch(0))


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """A schema as the registry gives it; `references` are the schemas that it names, by name, each before those that use it."""

    kind: str
    text: str
    references: Sequence[tuple[str, str]] = ()


def reader_of(given: Given) -> Reader:
    """Who reads values of a schema.

    Raises:
        ValueError: the schema cannot be used; the message says why.
    """
    if given.kind not in _READERS:
        raise ValueError(f"its type {given.kind[:32]} is none of {', '.join(_READERS)}")
    # Confluent's registry does not name Avro, which then is the kind; Apicurio's (2.6) names none.
    kinds = [given.kind] if given.kind != "AVRO" else ["AVRO", _kind_by_look(given.text)]
    problem: Exception | None = None
    for kind in kinds:
        try:
            return _READERS[kind](given)
        except Exception as error:  # noqa: BLE001  # fastavro's and protobuf's own kinds share no base
            problem = problem or error
    raise ValueError(f"it is no {given.kind} schema that can be used ({type(problem).__name__})") from problem


def _kind_by_look(text: str) -> str:
    """What a schema is that is not Avro."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return "PROTOBUF"
    is_json = isinstance(found, dict) and ("$schema" in found or "properties" in found)
    return "JSON" if is_json else "AVRO"


# -- Avro --------------------------------------------------------------------------------------------------------------

_AVRO_TYPES: Final = {
    "string": "string",
    "boolean": "boolean",
    "int": "int32",
    "long": "int64",
    "float": "float",
    "double": "double",
    "bytes": "bytes",
    "fixed": "bytes",
    "enum": "string",
    "record": "struct",
    "array": "array",
    "map": "map",
}
_LOGICAL: Final = {
    "timestamp-millis": "org.apache.kafka.connect.data.Timestamp",
    "date": "org.apache.kafka.connect.data.Date",
    "time-millis": "org.apache.kafka.connect.data.Time",
}
"""Avro's logical types that Connect's AvroConverter has names for."""


class AvroReader:
    """Reads Avro. Logical types stay the numbers and bytes that they are written as."""

    def __init__(self, given: Given) -> None:
        import fastavro

        names: dict[str, Any] = {}
        for _, text in given.references:
            fastavro.parse_schema(_without_logical_types(json.loads(text)), named_schemas=names)
        schema = json.loads(given.text)
        self._schema: Any = fastavro.parse_schema(_without_logical_types(schema), named_schemas=names)
        self._connect = _connect_of_avro(schema, {}, 0)

    def read(self, framed: Framed) -> Decoded:
        import fastavro

        stream = io.BytesIO(framed.payload)
        try:
            value = fastavro.schemaless_reader(stream, self._schema, None)
        except Exception:  # noqa: BLE001  # fastavro raises what its types raise: EOFError, IndexError, KeyError, …
            raise BadRow("malformed", "the value: expected Avro as its schema says") from None
        if stream.tell() != len(framed.payload):
            raise BadRow("malformed", "the value: expected Avro as its schema says, and nothing after it")
        return Decoded(value, self._connect)


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    if isinstance(schema, list):
        return [_without_logical_types(one) for one in schema]
    return schema


def _connect_of_avro(schema: Any, names: dict[str, ConnectSchema], depth: int) -> ConnectSchema | None:
    """An Avro schema as Connect has it; None for what Connect has no type for."""
    if depth > _DEEPEST:
        return None
    if isinstance(schema, list):
        others = [one for one in schema if one != "null"]
        if len(others) != 1 or len(others) == len(schema):
            return _connect_of_avro(others[0], names, depth + 1) if len(schema) == 1 else None
        inner = _connect_of_avro(others[0], names, depth + 1)
        return None if inner is None else {**inner, "optional": True}
    if isinstance(schema, str):
        kind = _AVRO_TYPES.get(schema)
        return names.get(schema) if kind is None else {"type": kind, "optional": False}
    if not isinstance(schema, dict):
        return None
    kind = schema.get("type")
    if isinstance(kind, dict | list):
        return _connect_of_avro(kind, names, depth + 1)
    found: dict[str, Any] = {"type": _AVRO_TYPES.get(str(kind)), "optional": False}
    if found["type"] is None:
        return names.get(str(kind))
    if (name := schema.get("connect.name") or _LOGICAL.get(str(schema.get("logicalType")))) and found[
        "type"
    ] != "struct":
        found |= {"name": name, "version": schema.get("connect.version", 1)}
    if isinstance(parameters := schema.get("connect.parameters"), dict):
        found["parameters"] = parameters
    if isinstance(full_name := schema.get("name"), str):
        names[full_name] = found
    if kind == "record":
        found["fields"] = [
            {**inner, "field": field["name"]}
            for field in schema.get("fields", ())
            if (inner := _connect_of_avro(field.get("type"), names, depth + 1)) is not None
        ]
    elif kind == "array":
        found["items"] = _connect_of_avro(schema.get("items"), names, depth + 1)
    elif kind == "map":
        found |= {
            "keys": {"type": "string", "optional": False},
            "values": _connect_of_avro(schema.get("values"), names, depth + 1),
        }
    return found


# -- JSON Schema -------------------------------------------------------------------------------------------------------

_JSON_TYPES: Final = {
    "string": "string",
    "boolean": "boolean",
    "integer": "int64",
    "number": "double",
    "object": "struct",
    "array": "array",
}


class JsonReader:
    """Reads JSON. Who wrote it has checked it by the schema; here the schema says of which types the columns are."""

    def __init__(self, given: Given) -> None:
        schema = json.loads(given.text)
        self._connect = _connect_of_json(schema, 0) if isinstance(schema, dict) else None

    def read(self, framed: Framed) -> Decoded:
        return Decoded(json_of(framed.payload, "the value"), self._connect)


def _connect_of_json(schema: Mapping[str, Any], depth: int) -> ConnectSchema | None:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), None)
    for choice in ("oneOf", "anyOf"):  # how an optional field is usually written
        others = schema.get(choice)
        if kind is None and isinstance(others, list):
            real = [one for one in others if isinstance(one, dict) and one.get("type") != "null"]
            if len(real) == 1:
                return _connect_of_json(real[0], depth + 1)
    if depth > _DEEPEST or not isinstance(kind, str) or kind not in _JSON_TYPES:
        return None
    found: dict[str, Any] = {"type": schema.get("connect.type", _JSON_TYPES[kind]), "optional": True}
    properties = schema.get("properties")
    if kind == "object" and isinstance(properties, dict):
        found["fields"] = [
            {**inner, "field": name}
            for name, its in properties.items()
            if isinstance(its, dict) and (inner := _connect_of_json(its, depth + 1)) is not None
        ]
    if kind == "array" and isinstance(schema.get("items"), dict):
        found["items"] = _connect_of_json(schema["items"], depth + 1)
    return found


# -- Protobuf ----------------------------------------------------------------------------------------------------------

_WRAPPER: Final = re.compile(r"google\.protobuf\.(\w+)Value")


class ProtobufReader:
    """Reads Protobuf. The registry gives its schemas serialized: descriptors in base64."""

    def __init__(self, given: Given) -> None:
        from google.protobuf import descriptor_pb2, descriptor_pool

        pool = descriptor_pool.DescriptorPool()
        for name, text in [*given.references, ("embedq-root.proto", given.text)]:
            file = descriptor_pb2.FileDescriptorProto()
            file.ParseFromString(base64.b64decode(text, validate=True))
            file.name = name
            for dependency in file.dependency:
                _add_well_known(pool, dependency)
            pool.Add(file)
        self._file = pool.FindFileByName("embedq-root.proto")
        self._order = [message.name for message in file.message_type]

    def read(self, framed: Framed) -> Decoded:
        from google.protobuf import message_factory
        from google.protobuf.message import DecodeError

        if framed.indexes is None:
            indexes, begins = message_indexes(framed.payload)
            payload = framed.payload[begins:]
        else:
            indexes, _ = message_indexes(framed.indexes)
            payload = framed.payload
        try:
            descriptor = self._file.message_types_by_name[self._order[indexes[0]]]
            for index in indexes[1:]:
                descriptor = descriptor.nested_types[index]
        except IndexError:
            raise BadRow("malformed", "the value: expected a message of its Protobuf schema") from None
        message = message_factory.GetMessageClass(descriptor)()
        try:
            message.ParseFromString(payload)
        except (DecodeError, RuntimeError):  # the latter for what is nested too deep
            raise BadRow("malformed", "the value: expected Protobuf as its schema says") from None
        return Decoded(_from_message(message, 0), _connect_of_message(descriptor, 0))


def _add_well_known(pool: Any, name: str) -> None:
    """Google's own types, which no registry has: they come with the library."""
    import importlib

    from google.protobuf import descriptor_pool

    if not re.fullmatch(r"google/(protobuf|type)/[a-z_]+\.proto", name):
        return
    module = name.removesuffix(".proto").replace("/", ".") + "_pb2"
    try:
        importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{name} is not there") from None
    file = descriptor_pool.Default().FindFileByName(name)
    for dependency in file.dependencies:
        _add_well_known(pool, dependency.name)
    pool.AddSerializedFile(file.serialized_pb)


def _from_message(message: Any, depth: int) -> Any:
    """A message as JSON would have it, but for numbers of 64 bits, which stay numbers, and bytes."""
    descriptor = message.DESCRIPTOR
    if depth > _DEEPEST:
        return None
    if _WRAPPER.fullmatch(descriptor.full_name):
        return message.value
    if descriptor.full_name in _AS_JSON:
        from google.protobuf import json_format

        return msgspec.json.decode(json_format.MessageToJson(message, preserving_proto_field_name=True))
    found: dict[str, Any] = {}
    for field in descriptor.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name["value"]
            found[field.name] = {
                str(key): _from_value(value[key], entry, depth) for key in sorted(value, key=str)
            }
        elif _is_repeated(field):
            found[field.name] = [_from_value(one, field, depth) for one in value]
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        else:
            found[field.name] = _from_value(value, field, depth)
    return found


_AS_JSON: Final = frozenset(
    f"google.protobuf.{name}"
    for name in ("Timestamp", "Duration", "Struct", "Value", "ListValue", "FieldMask")
)
"""Messages that JSON writes as something else than objects of their fields."""


def _from_value(value: Any, field: Any, depth: int) -> Any:
    if field.message_type is not None:
        return _from_message(value, depth + 1)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    return value


def _is_repeated(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


_PROTOBUF_TYPES: Final = {
    1: "int32",
    2: "int64",
    3: "int64",  # uint32
    4: "int64",  # uint64: those above 2^63 have no type in Connect
    5: "double",
    6: "float",
    7: "boolean",
    8: "string",  # an enum's name
    9: "string",
}
"""By `cpp_type`."""


def _connect_of_message(descriptor: Any, depth: int) -> ConnectSchema | None:
    if depth > 0:
        return None  # nested messages travel as JSON text, or by their values
    fields = []
    for field in descriptor.fields:
        kind = _PROTOBUF_TYPES.get(field.cpp_type)
        if kind is None and field.message_type is not None:
            wrapped = _WRAPPER.fullmatch(field.message_type.full_name)
            inner = field.message_type.fields_by_name.get("value") if wrapped else None
            kind = None if inner is None else _PROTOBUF_TYPES.get(inner.cpp_type)
        if field.type == field.TYPE_BYTES:
            kind = "bytes"
        if kind is not None and not _is_repeated(field):
            fields.append({"field": field.name, "type": kind, "optional": True})
    return {"type": "struct", "optional": False, "fields": fields}


_READERS: Final[Mapping[str, Callable[[Given], Reader]]] = {
    "AVRO": AvroReader,
    "JSON": JsonReader,
    "PROTOBUF": ProtobufReader,
}
