"""A record by its mapping: a job with its answer, a deleted row, or schemas to ask for first. Pure."""

from __future__ import annotations

from collections.abc import Mapping as Map
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from embedq_consumer.shapes.answers import Answer, BatchAnswer, FlatAnswer, own_columns
from embedq_consumer.shapes.columns import TypedColumn, typed
from embedq_consumer.shapes.envelopes import (
    attributes_of,
    binary_event,
    connect_row,
    debezium_row,
    event_data,
    is_structured,
    json_of,
    peeled_of,
    row_of,
    structured_event,
)
from embedq_consumer.shapes.mapping import REGISTERED, Column, Mapping
from embedq_consumer.shapes.output_schemas import registration_of
from embedq_consumer.shapes.registry.schemas import Fetch, Refused, Schemas, Want
from embedq_consumer.shapes.registry.wire_format import KEY_HEADER, VALUE_HEADER, framed
from embedq_consumer.shapes.rows import MISSING, BadRow, Decoded, Deleted, Row, bounded, named, object_of
from embedq_consumer.shapes.template import NullText
from embedq_shared.codec import BadJob, decode_job, format_of
from embedq_shared.messages import MAX_ID_LENGTH, Job
from embedq_shared.topics import CONTENT_TYPE

_INT64: Final = range(-(2**63), 2**63)
_BATCH_FIELDS: Final = ("custom_id", "method", "url", "body")
_ENDPOINT: Final = "/v1/embeddings"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A record as a mapping reads it. `name` is its topic, partition and offset; `max_inputs` what a job may hold."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    name: str
    max_inputs: int


class Embeddable(msgspec.Struct, frozen=True):
    """A row with a text."""

    job: Job
    answer: Answer


class Removal(msgspec.Struct, frozen=True):
    """A row that is gone: the answer is a tombstone under its key."""

    mapping: Mapping
    id: str
    key: bytes


class Unknown(msgspec.Struct, frozen=True):
    """Schemas that the registry must be asked for before the record can be read or answered."""

    want: Want


class BadLine(msgspec.Struct, frozen=True):
    """A batch line that is no job, and has an id by which its answer says so."""

    bad: BadJob
    answer: BatchAnswer


Reading = Embeddable | Removal | Unknown | BadLine


class _Ask(Exception):
    """The registry must be asked for `args[0]` first."""


def read(mapping: Mapping, message: Message, schemas: Schemas) -> Reading:
    """What a record is.

    Raises:
        BadRow: it is nothing that its mapping can read.
    """
    try:
        if mapping.shape == "openai-batch":
            return _batch_line(mapping, message)
        return _row(mapping, message, schemas)
    except _Ask as ask:
        return Unknown(ask.args[0])


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(mapping: Mapping, message: Message, schemas: Schemas) -> Reading:
    row = _unwrapped(mapping, message, schemas)
    if isinstance(row, Deleted):
        return _removal(mapping, message, row.before, schemas)
    id = _id_of(mapping, message, row, schemas)
    try:
        return _embeddable(mapping, message, row, id, schemas)
    except BadRow as bad:
        bad.id = bad.id or _text_id(id)
        raise


def _embeddable(mapping: Mapping, message: Message, row: Row, id: int | str, schemas: Schemas) -> Reading:
    if mapping.text is None:
        raise RuntimeError(f"the mapping {mapping.name} has no text. This is a bug.")
    try:
        text = mapping.text.render(row)
    except NullText as null:
        if mapping.null_text == "delete":
            return _removal(mapping, message, row, schemas)
        name = null.args[0]
        raise BadRow("invalid_value", f"`{name}`: expected a text, got null", name) from None
    answer = FlatAnswer(
        mapping=mapping,
        id=id,
        key=_key_of(mapping, message, id),
        columns=tuple(_columns(mapping, row)),
    )
    if mapping.output.format in REGISTERED:
        registration = registration_of(mapping.output, [*own_columns(mapping, id), *answer.columns])
        number = schemas.number(registration)
        if number is None:
            raise _Ask(registration)
        if isinstance(number, Refused):
            raise BadRow(
                "invalid_value",
                f"the result: expected a schema that the registry takes for {registration.subject}; {number.reason}; the "
                "mapping's `types` settle the columns' types",
            )
        answer = msgspec.structs.replace(answer, registered=(registration, number))
    try:
        answer = answer.sized()
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRow(
            "invalid_value",
            f"the row's columns: expected values that {mapping.output.format} can hold ({type(error).__name__})",
        ) from None
    return Embeddable(msgspec.structs.replace(mapping.job, input=text, id=_text_id(id)), answer)


def _unwrapped(mapping: Mapping, message: Message, schemas: Schemas) -> Row | Deleted:
    if mapping.shape == "cloudevents":
        return _event(message, schemas)
    if message.value is None:
        return Deleted()
    found = _decoded(message.value, message, VALUE_HEADER, schemas)
    if mapping.shape == "debezium":
        return debezium_row(found)
    if mapping.shape == "connect":
        return connect_row(found)
    return row_of(found)


def _event(message: Message, schemas: Schemas) -> Row | Deleted:
    headers = _last(message.headers)
    content_type = _content_type(headers)
    attributes = attributes_of(headers)
    if message.value is None:
        return binary_event(attributes, None) if attributes else Deleted()
    if is_structured(content_type) or not attributes:
        return structured_event(_decoded(message.value, message, VALUE_HEADER, schemas), content_type)
    registered = framed(message.value, headers, VALUE_HEADER) is not None
    if registered or format_of(headers.get(CONTENT_TYPE)) == "msgpack":
        return binary_event(attributes, _decoded(message.value, message, VALUE_HEADER, schemas).value)
    return binary_event(attributes, event_data(message.value, content_type) if message.value else None)


def _removal(mapping: Mapping, message: Message, before: Row | None, schemas: Schemas) -> Removal:
    if not mapping.deletes:
        raise BadRow(
            "malformed", "the value: expected a row, got a deleted one, which the mapping does not take"
        )
    if before is not None and mapping.id is not None:
        found = before.get(mapping.id)
        if found is not MISSING and found is not None:
            id = _checked_id(found, mapping.id)
            return Removal(mapping, _text_id(id), _key_of(mapping, message, id))
    if message.key is None:
        raise BadRow("invalid_value", "the key: expected the deleted row's id, got none", "key")
    id = _id_of_key(mapping, message, message.key, schemas)
    return Removal(mapping, _text_id(id), _key_of(mapping, message, id))


# -- ids and keys ------------------------------------------------------------------------------------------------------


def _id_of(mapping: Mapping, message: Message, row: Row, schemas: Schemas) -> int | str:
    if mapping.id is not None:
        found = row.get(mapping.id)
        if found is MISSING:
            name = named(mapping.id)
            raise BadRow("invalid_value", f"`{name}`: expected a field of this name, the mapping's id", name)
        return _checked_id(found, mapping.id)
    if row.id is not None:
        return _checked_id(row.id, "id")
    if message.key is not None:
        return _id_of_key(mapping, message, message.key, schemas)
    return message.name


def _id_of_key(mapping: Mapping, message: Message, key: bytes, schemas: Schemas) -> int | str:
    """The id in a record's key: a number or a text, alone, in JSON, or as the field of an object that has the id's name or
    is the only one."""
    headers = _last(message.headers)
    if framed(key, headers, KEY_HEADER) is not None:
        found = _decoded(key, message, KEY_HEADER, schemas)
    else:
        try:
            found = Decoded(bounded(msgspec.json.decode(key), "the key"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = Decoded(None)
    value = peeled_of(found).value
    if isinstance(value, dict):
        name = (mapping.id or "id").rpartition(".")[2]
        if name not in value and len(value) == 1:
            name = next(iter(value))
        if name not in value:
            raise BadRow("invalid_value", f"the key: expected a field `{named(name)}`, the id's", "key")
        return _checked_id(value[name], "key")
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return _checked_id(value, "key")
    try:
        return _checked_id(key.decode(), "key")
    except UnicodeDecodeError:
        raise BadRow(
            "invalid_value", "the key: expected an id in UTF-8, in JSON, or by its schema", "key"
        ) from None


def _checked_id(found: Any, path: str) -> int | str:
    name = named(path)
    if isinstance(found, int) and not isinstance(found, bool) and found in _INT64:
        return found
    if isinstance(found, str) and 1 <= len(found) <= MAX_ID_LENGTH:
        return found
    raise BadRow(
        "invalid_value", f"`{name}`: expected an integer or a string of 1 to {MAX_ID_LENGTH} characters", name
    )


def _text_id(id: int | str) -> str:
    return str(id)


def _key_of(mapping: Mapping, message: Message, id: int | str) -> bytes:
    if mapping.output.key == "id":
        return _text_id(id).encode()
    if message.key is None:
        raise BadRow("invalid_value", "the key: expected one, which the mapping's results have too", "key")
    return message.key


# -- columns -----------------------------------------------------------------------------------------------------------


def _columns(mapping: Mapping, row: Row) -> list[TypedColumn]:
    output = mapping.output
    wanted = mapping.columns
    if wanted is None:
        wanted = tuple(Column(name, name) for name in row.fields if name != mapping.id)
    found = []
    for column in wanted:
        name = column.name
        if output.nest is None and mapping.columns is None and name in output.own_names:
            raise BadRow(
                "invalid_value",
                f"`{named(name)}`: expected no column of this name, which the result has itself; the mapping's `output.names` "
                "gives that another one",
                named(name),
            )
        value = row.get(column.path)
        if value is MISSING:
            value = None  # serializers leave out what is null
        schema, declared = row.schema(column.path), mapping.types.get(name)
        if output.format == "json" and declared is None:
            found.append(TypedColumn(name, {}, value))
        else:
            found.append(typed(name, value, schema, declared, nested=output.format == "connect"))
    return found


# -- batch lines -------------------------------------------------------------------------------------------------------


def _batch_line(mapping: Mapping, message: Message) -> Embeddable | BadLine:
    line = object_of(json_of(message.value or b"", "the value"), "the value")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_LENGTH:
        raise BadRow(
            "invalid_value",
            f"`custom_id`: expected a string of 1 to {MAX_ID_LENGTH} characters, as in a line of an OpenAI batch",
            "custom_id",
        )
    answer = BatchAnswer(mapping=mapping, custom_id=custom_id, name=message.name)
    try:
        return Embeddable(_batch_job(mapping, message, line, custom_id), answer)
    except BadJob as bad:
        return BadLine(bad, answer)


def _batch_job(mapping: Mapping, message: Message, line: Map[str, Any], custom_id: str) -> Job:
    for name in line:
        if name not in _BATCH_FIELDS:
            raise BadJob(
                "unknown_field",
                f"unknown field `{named(name)}`; a batch line has: {', '.join(_BATCH_FIELDS)}",
                named(name),
            )
    if line.get("method", "POST") != "POST":
        raise BadJob("invalid_value", "`method`: expected POST", "method")
    if line.get("url", _ENDPOINT) != _ENDPOINT:
        raise BadJob("invalid_value", f"`url`: expected {_ENDPOINT}", "url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise BadJob("invalid_value", "`body`: expected the body of an embeddings request", "body")
    whole = {**body, **mapping.options}
    whole.setdefault("id", custom_id)
    return decode_job(msgspec.json.encode(whole), "json", max_inputs=message.max_inputs)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _decoded(data: bytes, message: Message, header: str, schemas: Schemas) -> Decoded:
    """A value or key by its encoding: the registry's wire format, MessagePack by the content type, else JSON."""
    headers = _last(message.headers)
    if (found := framed(data, headers, header)) is not None:
        want = Fetch(found.schema)
        reader = schemas.reader(want)
        if reader is None:
            raise _Ask(want)
        if isinstance(reader, Refused):
            raise BadRow(
                "malformed",
                f"the value: expected a schema that can be read, got Schema Registry's number {found.schema}; {reader.reason}",
            )
        read = reader.read(found)
        return Decoded(bounded(read.value, "the value"), read.schema)
    if format_of(headers.get(CONTENT_TYPE)) == "msgpack":
        try:
            return Decoded(bounded(msgspec.msgpack.decode(data), "the value"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BadRow("malformed", "the value: expected valid MessagePack") from None
    return Decoded(json_of(data, "the value"))


def _content_type(headers: Map[str, bytes]) -> str:
    raw = headers.get(CONTENT_TYPE, b"")
    return raw.split(b";", 1)[0].strip().lower().decode("latin-1")


def _last(headers: Sequence[tuple[str, bytes | None]]) -> dict[str, bytes]:
    """The last value of each header; the content type's name in small letters, as everywhere."""
    found: dict[str, bytes] = {}
    for name, value in headers:
        key = CONTENT_TYPE if name.lower() == CONTENT_TYPE else name
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found
