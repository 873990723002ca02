"""Rows out of their envelopes: Kafka Connect's, Debezium's, CloudEvents'. Pure."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from embedq_consumer.shapes.rows import (
    BadRow,
    ConnectSchema,
    Decoded,
    Deleted,
    Row,
    bounded,
    named,
    object_of,
    schemas_of,
)

_CONNECT: Final = {"schema", "payload"}
_AFTER: Final = {"c": "create", "u": "update", "r": "snapshot"}
"""Debezium's operations that leave a row."""
_REQUIRED: Final = ("id", "source", "type")
_STRUCTURED: Final = "application/cloudevents"
_ATTRIBUTE: Final = "ce_"


def row_of(found: Decoded) -> Row | Deleted:
    """A plain row. One that Debezium's unwrapping transform marks as deleted is."""
    fields = object_of(found.value, "the value")
    row = Row(fields=fields, schemas=schemas_of(found.schema))
    if fields.get("__deleted") in ("true", True):
        return Deleted(before=row)
    return row


def connect_row(found: Decoded) -> Row | Deleted:
    """The payload of JsonConverter's envelope; a null payload is a deleted row."""
    peeled = peeled_of(found)
    if peeled is found:
        raise BadRow(
            "malformed",
            "the value: expected an object with `schema` and `payload`, as JsonConverter writes with schemas",
        )
    return Deleted() if peeled.value is None else row_of(peeled)


def peeled_of(found: Decoded) -> Decoded:
    """What is inside JsonConverter's envelope, with its schema; the same where there is no such envelope."""
    value = found.value
    if isinstance(value, dict) and value.keys() == _CONNECT:
        schema = value["schema"]
        return Decoded(value["payload"], schema if isinstance(schema, dict) else None)
    return found


def debezium_row(found: Decoded) -> Row | Deleted:
    """The row of a change event: after a create, an update or a snapshot; before a delete."""
    peeled = peeled_of(found)
    if peeled.value is None:
        return Deleted()
    event = object_of(peeled.value, "the value")
    operation = event.get("op")
    if isinstance(operation, str) and operation in _AFTER:
        row = _side(event, peeled.schema, "after")
        if row is None:
            raise BadRow("invalid_value", f"`after`: expected the row of a {_AFTER[operation]}", "after")
        return row
    if operation == "d":
        return Deleted(before=_side(event, peeled.schema, "before"))
    if operation == "t":
        raise BadRow("invalid_value", "`op`: expected a change of one row, got a truncated table", "op")
    raise BadRow("invalid_value", "`op`: expected c, u, r or d, as Debezium's change events have it", "op")


def _side(event: Mapping[str, Any], schema: ConnectSchema | None, side: str) -> Row | None:
    found = event.get(side)
    if isinstance(found, str):  # MongoDB's connector writes the document as JSON
        try:
            found = bounded(msgspec.json.decode(found), f"`{side}`")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BadRow("invalid_value", f"`{side}`: expected an object, or one as JSON", side) from None
    if found is None:
        return None
    return Row(fields=object_of(found, f"`{side}`", side), schemas=schemas_of(schemas_of(schema).get(side)))


# -- CloudEvents -------------------------------------------------------------------------------------------------------


def is_structured(content_type: str) -> bool:
    """Whether a content type is that of a CloudEvent in structured mode."""
    return content_type.startswith(_STRUCTURED)


def structured_event(found: Decoded, content_type: str) -> Row:
    """A CloudEvent that is the record's value, in JSON."""
    if is_structured(content_type) and content_type != "application/cloudevents+json":
        raise BadRow(
            "unsupported_content_type",
            "header `content-type`: expected one CloudEvent as application/cloudevents+json, or in binary mode",
            "content-type",
        )
    event = object_of(found.value, "the value")
    attributes = {name: value for name, value in event.items() if name not in ("data", "data_base64")}
    data = event.get("data")
    if data is None and "data_base64" in event:
        data = _from_base64(event["data_base64"])
        inner = attributes.get("datacontenttype")
        data = event_data(data, inner if isinstance(inner, str) else "")
    return _event(attributes, data)


def binary_event(attributes: Mapping[str, str], data: Any) -> Row:
    """A CloudEvent whose attributes are headers; their names come without `ce_`."""
    return _event(attributes, data)


def attributes_of(headers: Mapping[str, bytes]) -> dict[str, str]:
    """The attributes of a CloudEvent in binary mode.

    Raises:
        BadRow: one is not UTF-8.
    """
    found = {}
    for name, value in headers.items():
        if name.startswith(_ATTRIBUTE):
            try:
                found[name.removeprefix(_ATTRIBUTE)] = value.decode()
            except UnicodeDecodeError:
                raise BadRow(
                    "invalid_header", f"header `{named(name)}`: expected UTF-8", named(name)
                ) from None
    return found


def event_data(data: bytes, content_type: str) -> Any:
    """The data of an event by its content type: an object as it is, a text as the column `data`.

    Raises:
        BadRow: it is of another kind, or broken.
    """
    if content_type in ("", "application/json", "text/json") or content_type.endswith("+json"):
        return json_of(data, "the event's data")
    if content_type.startswith("text/"):
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise BadRow("malformed", "the event's data: expected UTF-8") from None
    raise BadRow(
        "unsupported_content_type",
        "the event's data: expected application/json or text, by `datacontenttype`",
        "datacontenttype",
    )


def json_of(data: bytes, what: str) -> Any:
    """A JSON value.

    Raises:
        BadRow: it is none.
    """
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRow("malformed", f"{what}: expected valid JSON in UTF-8 without BOM") from None
    return bounded(found, what)


def _event(attributes: Mapping[str, Any], data: Any) -> Row:
    version = attributes.get("specversion")
    if not isinstance(version, str) or not version.startswith("1."):
        raise BadRow("malformed", "`specversion`: expected a CloudEvent of version 1", "specversion")
    for name in _REQUIRED:
        value = attributes.get(name)
        if not isinstance(value, str) or not value:
            raise BadRow("invalid_value", f"`{name}`: expected a CloudEvent's attribute, a string", name)
    fields = {f"{_ATTRIBUTE}{name}": value for name, value in attributes.items()}
    if isinstance(data, dict):
        fields |= object_of(data, "`data`", "data")
    elif data is not None:
        fields["data"] = data
    return Row(fields=fields, id=attributes["id"])


def _from_base64(value: Any) -> bytes:
    try:
        return b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BadRow("invalid_value", "`data_base64`: expected base64 text", "data_base64") from None
