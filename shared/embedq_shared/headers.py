"""A job's headers: correlation, reply address, deadline, client, trace. The last header of a name counts."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from embedq_shared import topics
from embedq_shared.messages import ErrorBody

Header = tuple[str, bytes]

_PARTITION: Final = struct.Struct(">i")
_MAX_DEADLINE: Final = 2**63 - 1
MAX_CLIENT_BYTES: Final = 256
"""Of a `client-id`; more is not looked at. Long enough for any name, short enough to be kept with each record."""
_ECHO: Final = (*topics.CORRELATION, *topics.TRACE)
_ADDRESS: Final = frozenset((*topics.REPLY_TOPIC, *topics.REPLY_PARTITION))
_ASKED: Final = _ADDRESS | {topics.DEADLINE}
"""Without these there is nothing to read but what goes back."""
_CONTENT_TYPE_LENGTH: Final = len(topics.CONTENT_TYPE)


class JobHeaders(msgspec.Struct, frozen=True, kw_only=True):
    """What embedq reads of a record's headers. Values in `echo` are opaque and go back byte for byte."""

    content_type: bytes | None = None
    echo: tuple[Header, ...] = ()
    reply_topic: str | None = None
    reply_partition: int | None = None
    topic_header: str | None = None
    """The name of the header that `reply_topic` came in, for errors: no other client would know it by embedq's."""
    partition_header: str | None = None
    deadline_ms: int | None = None
    bad_address: ErrorBody | None = None
    """Why the reply address can't be used. The job is then not computed, and this error goes to the results topic."""
    bad_deadline: ErrorBody | None = None
    """Why the deadline can't be read."""

    @property
    def address_header(self) -> str | None:
        """The name of the header that says where the result goes; None without one."""
        return self.topic_header or self.partition_header


def parse(headers: Sequence[tuple[str, bytes | None]]) -> JobHeaders:
    """Read the headers of one record. Never raises: errors are in `bad_address` and `bad_deadline`.

    A null value counts as no header, like a null field: outbox connectors write it for a column without a value.
    """
    values = dict(headers)
    content_type = values.get(topics.CONTENT_TYPE)
    for name in values:
        if len(name) == _CONTENT_TYPE_LENGTH and name != topics.CONTENT_TYPE:
            content_type = _last_content_type(headers)
    last = {name: value for name, value in values.items() if value is not None}
    echo = tuple([(name, last[name]) for name in _ECHO if name in last])
    if _ASKED.isdisjoint(last):
        return JobHeaders(content_type=content_type, echo=echo)
    topic: str | None = None
    partition: int | None = None
    topic_header, raw_topic = _first(last, topics.REPLY_TOPIC)
    partition_header, raw_partition = _first(last, topics.REPLY_PARTITION)
    deadline: int | None = None
    bad_address = bad_deadline = None
    try:
        found = _reply_topic(topic_header, raw_topic), _reply_partition(partition_header, raw_partition)
        topic, partition = found
    except ValueError as error:
        bad_address = _bad(error)
    try:
        deadline = _deadline(last.get(topics.DEADLINE))
    except ValueError as error:
        bad_deadline = _bad(error)
    return JobHeaders(
        content_type=content_type,
        echo=echo,
        reply_topic=topic,
        reply_partition=partition,
        topic_header=topic_header,
        partition_header=partition_header,
        deadline_ms=deadline,
        bad_address=bad_address,
        bad_deadline=bad_deadline,
    )


def _last_content_type(headers: Sequence[tuple[str, bytes | None]]) -> bytes | None:
    """In whatever case it is written: the last one."""
    return next((value for name, value in reversed(headers) if name.lower() == topics.CONTENT_TYPE), None)


def client_of(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """Whose job a record is, for fair shares: equal bytes, one client. Never raises, and reads nothing but headers.

    The header `client-id`; without it the reply address, since each requester reads a partition of its own; without both
    all senders are one client. The record's key says nothing of the sender: often it is the document's.
    """
    last = dict(headers)
    if client := last.get(topics.CLIENT):
        return b"id " + client[:MAX_CLIENT_BYTES]
    if _ADDRESS.isdisjoint(last):
        return b""
    _, topic = _first(last, topics.REPLY_TOPIC)
    _, partition = _first(last, topics.REPLY_PARTITION)
    if topic is None and partition is None:
        return b""
    return b"to " + (topic or b"")[:MAX_CLIENT_BYTES] + b" " + (partition or b"")[:4]


def reply_partition_bytes(partition: int) -> bytes:
    """A reply partition as Spring, SmallRye and embedq write it: 4 bytes, big-endian."""
    return _PARTITION.pack(partition)


def value_of(headers: Sequence[Header], name: str) -> bytes | None:
    """The last value of a header, None without one. For readers of results; jobs are read by `parse` in one pass."""
    for found, value in reversed(headers):
        if found == name:
            return value
    return None


def _reply_topic(name: str | None, raw: bytes | None) -> str | None:
    if raw is None:
        return None
    try:
        return _topic_name(raw)
    except UnicodeDecodeError:
        raise ValueError(name, "a topic name in UTF-8") from None
    except ValueError:
        raise ValueError(
            name, f"a topic name of 1 to {topics.MAX_TOPIC_LENGTH} letters, digits, '.', '_' or '-'"
        ) from None


@lru_cache(maxsize=1024)
def _topic_name(raw: bytes) -> str:
    """The name in these bytes. Jobs of a client name the same one again and again; what is no name is not remembered."""
    topic = raw.decode()
    if not topics.is_topic_name(topic):
        raise ValueError(topic)
    return topic


def _reply_partition(name: str | None, raw: bytes | None) -> int | None:
    if raw is None:
        return None
    if len(raw) != _PARTITION.size:
        raise ValueError(name, f"4 bytes, big-endian, got {len(raw)} bytes")
    partition: int = _PARTITION.unpack(raw)[0]
    if partition < 0:
        raise ValueError(name, "a partition of 0 or more")
    return partition


def _deadline(raw: bytes | None) -> int | None:
    if raw is None:
        return None
    # bytes.isdigit is ASCII alone, unlike str.isdigit and int(), which take signs, blanks and underscores.
    if not raw.isdigit() or len(raw) > 19 or int(raw) > _MAX_DEADLINE:
        raise ValueError(topics.DEADLINE, "epoch milliseconds as ASCII digits")
    return int(raw)


def _first(last: Mapping[str, bytes | None], family: tuple[str, ...]) -> tuple[str | None, bytes | None]:
    """The header of a family that counts; two None without one."""
    for name in family:
        if last.get(name) is not None:
            return name, last[name]
    return None, None


def _bad(error: ValueError) -> ErrorBody:
    name, expected = error.args
    return ErrorBody.of("invalid_header", f"header `{name}`: expected {expected}", name)
