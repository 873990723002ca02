"""What a group has committed, by the log in which Kafka keeps it: `__consumer_offsets`, record by record.

A coordinator's answer is no such witness. A broker that has just become the coordinator (Kafka 4) knows its whole log, and
answers with what lies below its high watermark, which may lie behind for a moment: an offset that was committed, answered and
seen is then missing from the answer (`test_stale_coordinator.py` shows it). The log's order is the truth.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from tests.faults.history import place

TOPIC: Final = "__consumer_offsets"
_OFFSET_KEYS: Final = (0, 1)
"""Versions of a key that are about an offset; the others are about groups and their members."""
_VERSION: Final = struct.Struct(">h")
_LENGTH: Final = struct.Struct(">h")
_PARTITION: Final = struct.Struct(">i")
_OFFSET: Final = struct.Struct(">q")
"""The first field of a value in each of its versions, right after the version."""


class Stored(msgspec.Struct, frozen=True):
    """What one record says: the offset of a partition, None where it is forgotten."""

    group: str
    partition: str
    offset: int | None


def stored_by(key: bytes | None, value: bytes | None) -> Stored | None:
    """What a record of the topic says of an offset; None if it is about something else.

    Raises:
        struct.error, UnicodeDecodeError: it is not as Kafka writes it.
    """
    if key is None or _VERSION.unpack_from(key)[0] not in _OFFSET_KEYS:
        return None
    group, at = _text(key, _VERSION.size)
    topic, at = _text(key, at)
    partition = place(topic, _PARTITION.unpack_from(key, at)[0])
    return Stored(group, partition, None if value is None else _OFFSET.unpack_from(value, _VERSION.size)[0])


def _text(data: bytes, at: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(data, at)
    end = at + _LENGTH.size + length
    return data[at + _LENGTH.size : end].decode(), end
