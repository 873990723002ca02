"""What a record of a retry topic says of its job: where it came from, and what became of it so far. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from embedq_shared.headers import Header
from embedq_shared.topics import is_topic_name

ORIGIN_TOPIC: Final = "embedq-origin-topic"
"""The first of our headers: everything before the last one of this name is the job's own."""
_ORIGIN_PARTITION: Final = "embedq-origin-partition"
_ORIGIN_OFFSET: Final = "embedq-origin-offset"
_ORIGIN_TIMESTAMP: Final = "embedq-origin-timestamp"
_ORIGIN_TIMESTAMP_TYPE: Final = "embedq-origin-timestamp-type"
_ATTEMPT: Final = "embedq-attempt"
_DUE: Final = "embedq-due"
_REASON: Final = "embedq-reason"
HISTORY: Final = "embedq-retries"
"""Also a header of dead letters."""

_TIMESTAMP_TYPES: Final = (b"CreateTime", b"LogAppendTime")
_MAX_MESSAGE: Final = 200
"""Characters kept of an error's message, since every later copy of the job carries it."""
_MOST_DIGITS: Final = 19


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One run that failed: when, in epoch milliseconds, on which replica, and by which error."""

    at: int
    replica: str
    code: str
    message: str


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """The record that the job came in by, and its runs so far, the first one first."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    timestamp_type: int
    attempts: tuple[Attempt, ...] = ()

    def failed(self, attempt: Attempt) -> Past:
        """The same after one more run."""
        short = msgspec.structs.replace(attempt, message=attempt.message[:_MAX_MESSAGE])
        return msgspec.structs.replace(self, attempts=(*self.attempts, short))


def headers_of(own: Iterable[Header], past: Past, due_ms: int) -> list[Header]:
    """The headers of a record for a retry topic: the job's own, then ours.

    The record's timestamp is that of its writing, not the job's: retention would delete an old one at once, and a
    broker may refuse it.
    """
    return [
        *own,
        (ORIGIN_TOPIC, past.topic.encode()),
        (_ORIGIN_PARTITION, b"%d" % past.partition),
        (_ORIGIN_OFFSET, b"%d" % past.offset),
        (_ORIGIN_TIMESTAMP, b"%d" % past.timestamp_ms),
        (_ORIGIN_TIMESTAMP_TYPE, _TIMESTAMP_TYPES[1 if past.timestamp_type else 0]),
        (_ATTEMPT, b"%d" % (len(past.attempts) + 1)),
        (_DUE, b"%d" % due_ms),
        (_REASON, past.attempts[-1].code.encode() if past.attempts else b""),
        (HISTORY, history_of(past)),
    ]


def history_of(past: Past) -> bytes:
    """The runs so far: a JSON list."""
    return msgspec.json.encode(past.attempts)


def past_of(headers: Sequence[tuple[str, bytes | None]]) -> tuple[Past | None, tuple[Header, ...]]:
    """What a record of a retry topic says, and its job's own headers.

    None with all of the headers if somebody else than a replica wrote it: it is a job like any other then. Never raises.
    """
    told = tuple((name, b"" if value is None else value) for name, value in headers)
    at = max((index for index, (name, _) in enumerate(told) if name == ORIGIN_TOPIC), default=None)
    if at is None:
        return None, told
    ours = dict(told[at:])
    try:
        past = Past(
            topic=_topic(ours[ORIGIN_TOPIC]),
            partition=_number(ours[_ORIGIN_PARTITION]),
            offset=_number(ours[_ORIGIN_OFFSET]),
            timestamp_ms=_timestamp(ours[_ORIGIN_TIMESTAMP]),
            timestamp_type=_TIMESTAMP_TYPES.index(ours[_ORIGIN_TIMESTAMP_TYPE]),
            attempts=msgspec.json.decode(ours[HISTORY], type=tuple[Attempt, ...]),
        )
    except (KeyError, ValueError, RecursionError):  # msgspec's and UnicodeDecodeError are ValueErrors
        return None, told
    return past, told[:at]


def due_ms_of(headers: Sequence[tuple[str, bytes | None]]) -> int | None:
    """When a record of a retry topic is due, in epoch milliseconds; None if it does not say."""
    for name, value in reversed(headers):
        if name == _DUE:
            return int(value) if value is not None and _is_decimal(value) else None
    return None


def _is_decimal(value: bytes) -> bool:
    return value.isdigit() and len(value) <= _MOST_DIGITS


def _number(value: bytes) -> int:
    if not _is_decimal(value):
        raise ValueError("expected a decimal number")
    return int(value)


def _timestamp(value: bytes) -> int:
    return -1 if value == b"-1" else _number(value)


def _topic(value: bytes) -> str:
    name = value.decode()
    if not is_topic_name(name):
        raise ValueError("expected a topic's name")
    return name
