"""Schema Registry's wire format: which schema a value was written with, and where its bytes begin. Pure."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from embedq_consumer.shapes.rows import BadRow

_ID: Final = struct.Struct(">BI")
_BY_ID: Final = 0
_BY_GUID: Final = 1
_GUID_BYTES: Final = 16
VALUE_HEADER: Final = "__value_schema_id"
KEY_HEADER: Final = "__key_schema_id"
_MOST_INDEXES: Final = 64
"""How deep a Protobuf message may lie inside others."""
_MOST_VARINT_BYTES: Final = 10


class Framed(msgspec.Struct, frozen=True):
    """A schema's number or GUID, and the bytes written by it. `indexes` are what stands before a Protobuf message elsewhere."""

    schema: int | str
    payload: bytes
    indexes: bytes | None = None


def framed(data: bytes, headers: Mapping[str, bytes], header: str) -> Framed | None:
    """The parts of a value or key in the wire format; None for any other one.

    The prefix is a zero byte and the schema's number. Newer producers put it, or the schema's GUID, into a header.

    Raises:
        BadRow: it begins like one and is not whole.
    """
    if (prefix := headers.get(header)) is not None:
        schema, rest = _split(prefix)
        return Framed(schema, data, rest)
    if not data or data[0] != _BY_ID:
        return None
    schema, payload = _split(data)
    return Framed(schema, payload)


def frame(schema: int, payload: bytes) -> bytes:
    """A value in the wire format."""
    return _ID.pack(_BY_ID, schema) + payload


def message_indexes(data: bytes) -> tuple[Sequence[int], int]:
    """Which message of a Protobuf schema was written, from the outermost in, and how many bytes say so.

    Raises:
        BadRow: the bytes end early, or mean nothing.
    """
    count, at = _varint(data, 0)
    if count == 0:  # the usual case has a form of its own
        return (0,), at
    if not 0 < count <= _MOST_INDEXES:
        raise BadRow("malformed", "the value: expected a Protobuf message's place in its schema")
    indexes = []
    for _ in range(count):
        index, at = _varint(data, at)
        indexes.append(index)
    return indexes, at


FIRST_MESSAGE: Final = b"\x00"
"""The place of the first message of a schema."""


def _split(data: bytes) -> tuple[int | str, bytes]:
    if len(data) >= _ID.size and data[0] == _BY_ID:
        return _ID.unpack_from(data)[1], data[_ID.size :]
    if len(data) > _GUID_BYTES and data[0] == _BY_GUID:
        return str(uuid.UUID(bytes=data[1 : _GUID_BYTES + 1])), data[_GUID_BYTES + 1 :]
    raise BadRow(
        "malformed", "the value: expected Schema Registry's wire format, a zero byte and a schema's number"
    )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A zigzag number, and where it ends."""
    found = shift = 0
    for byte in data[at : at + _MOST_VARINT_BYTES]:
        at += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (found >> 1) ^ -(found & 1), at
        shift += 7
    raise BadRow("malformed", "the value: expected a Protobuf message's place in its schema")
