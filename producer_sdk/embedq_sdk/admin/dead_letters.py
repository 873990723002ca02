"""A dead letter as an operator sees it, which of them a filter means, and which are settled. Pure.

A letter is settled once it was replayed or dropped: a note on the same partition of the dead-letter topic says so, since
Kafka deletes nothing from the middle of a partition.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec

from embedq_shared import codec
from embedq_shared.codec import BadJob
from embedq_shared.headers import Header, parse, value_of
from embedq_shared.topics import DEADLINE

NOTE: Final = "embedq-dlq-note"
"""Header of a record of the dead-letter topic that is no letter, but says which letters are settled, and how."""
Listed = TypeVar("Listed", list["Death"], list["Run"])
Fate = Literal["replayed", "dropped"]

_FIRST: Final = "kafka_dlt-original-topic"
"""The first of the headers that make a record a dead letter; everything before it is the record's own."""
_ID: Final = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')
_SEARCHED: Final = 4096


class Position(NamedTuple):
    """Where a letter lies on the dead-letter topic; written `partition:offset`."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """The value of a note: offsets of letters on its own partition."""

    offsets: list[int]


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """A process that ended while it had the record in hand; `at` is when that was noticed."""

    at: int
    replica: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the job that failed before it went to a retry topic; `at` is epoch milliseconds."""

    at: int
    replica: str
    code: str
    message: str


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter without the record's own content. Times are epoch milliseconds; None is what it does not say."""

    partition: int
    offset: int
    id: str | None
    error_code: str
    error_message: str
    original_topic: str
    original_partition: int | None
    original_offset: int | None
    original_timestamp: int | None
    reply_topic: str | None
    attempts: int | None
    result_sent: bool | None
    replica: str | None
    first_seen: int | None
    model_version: str | None
    history: list[Death]
    """The processes that the record killed."""
    retries: list[Run]
    """The runs before the last one, oldest first."""
    value_bytes: int | None
    """None: the record's content is not here, only its place."""
    settled: Fate | None = None

    @property
    def position(self) -> Position:
        """Where it lies."""
        return Position(self.partition, self.offset)


class LetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant: those that match every field that is given."""

    codes: Collection[str] = ()
    topics: Collection[str] = ()
    """The job topics that they came from."""
    ids: Collection[str] = ()
    """Ids of jobs."""
    reply_topics: Collection[str] = ()
    positions: Collection[Position] = ()
    since_ms: int | None = None
    """By the time of the job's record, as are `until_ms` and a letter's `original_timestamp`."""
    until_ms: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it means all letters."""
        return self == LetterFilter()

    def matches(self, letter: DeadLetter) -> bool:
        """Whether this letter is meant."""
        time = letter.original_timestamp
        return (
            (not self.codes or letter.error_code in self.codes)
            and (not self.topics or letter.original_topic in self.topics)
            and (not self.ids or letter.id in self.ids)
            and (not self.reply_topics or letter.reply_topic in self.reply_topics)
            and (not self.positions or letter.position in self.positions)
            and (self.since_ms is None or (time is not None and time >= self.since_ms))
            and (self.until_ms is None or (time is not None and time < self.until_ms))
        )


def letter_of(
    partition: int, offset: int, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]
) -> DeadLetter:
    """The letter in a record of the dead-letter topic, whoever wrote it. Never raises."""
    told = [(name, content or b"") for name, content in headers]
    own = original_headers(told)
    ours = told[len(own) :]  # what is not in every letter must not be taken from the job's own headers
    code = _text(told, "embedq-error-code") or "unknown"
    return DeadLetter(
        partition=partition,
        offset=offset,
        id=_id_of(value, own, code),
        error_code=code,
        error_message=_text(told, "embedq-error-message") or "",
        original_topic=_text(told, _FIRST) or "",
        original_partition=_binary(told, "kafka_dlt-original-partition", 4),
        original_offset=_binary(told, "kafka_dlt-original-offset", 8),
        original_timestamp=_binary(told, "kafka_dlt-original-timestamp", 8),
        reply_topic=parse(own).reply_topic,
        attempts=_decimal(told, "embedq-attempts"),
        result_sent={b"true": True, b"false": False}.get(value_of(told, "embedq-result-sent") or b""),
        replica=_text(told, "embedq-replica"),
        first_seen=_decimal(told, "embedq-first-seen"),
        model_version=_text(ours, "embedq-model-version"),
        history=_list(value_of(ours, "embedq-history"), list[Death]),
        retries=_list(value_of(ours, "embedq-retries"), list[Run]),
        value_bytes=None if value is None else len(value),
    )


def note_of(
    value: bytes | None, headers: Sequence[tuple[str, bytes | None]]
) -> tuple[Fate, list[int]] | None:
    """What a note says; None if the record is none."""
    fate = value_of([(name, content or b"") for name, content in headers], NOTE)
    if fate not in (b"replayed", b"dropped"):
        return None
    try:
        note = msgspec.json.decode(value or b"", type=Note)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return ("replayed" if fate == b"replayed" else "dropped"), note.offsets


def original_headers(headers: Iterable[Header], *, deadline: bool = True) -> list[Header]:
    """A letter's headers without those that made it one: the record's own, even if it came from another dead letter.

    `deadline`: whether to keep the job's deadline, which has most likely passed.
    """
    own = list(headers)
    starts = [index for index, (name, _) in enumerate(own) if name == _FIRST]
    own = own[: starts[-1]] if starts else own
    return [(name, content) for name, content in own if deadline or name != DEADLINE]


def deletable_before(letters: Iterable[DeadLetter], begin: int, end: int) -> int:
    """The offset up to which a partition's records, from `begin` to `end`, may be deleted: its first unsettled letter."""
    open_ones = (letter.offset for letter in letters if letter.settled is None and letter.offset >= begin)
    return min(open_ones, default=end)


def _id_of(value: bytes | None, headers: Sequence[Header], code: str) -> str | None:
    """The job's id, as far as it can be read. The value of one that killed processes is searched and not decoded."""
    if value is None:
        return None
    if code == "crashed":
        found = _ID.search(value[:_SEARCHED]) or _ID.search(value[-_SEARCHED:])
        return found[1].decode(errors="replace") if found else None
    format = codec.format_of(parse(headers).content_type) or "json"
    try:
        return codec.decode_job(value, format).id
    except BadJob as bad:
        return bad.envelope.id


def _text(headers: Sequence[Header], name: str) -> str | None:
    found = value_of(headers, name)
    return None if found is None else found.decode(errors="replace")


def _decimal(headers: Sequence[Header], name: str) -> int | None:
    found = value_of(headers, name) or b""
    return int(found) if found.isdigit() and len(found) <= 19 else None


def _binary(headers: Sequence[Header], name: str, size: int) -> int | None:
    found = value_of(headers, name)
    return int.from_bytes(found, "big", signed=True) if found is not None and len(found) == size else None


def _list(value: bytes | None, kind: type[Listed]) -> Listed:
    """A JSON list of a header, empty if it is none."""
    try:
        return msgspec.json.decode(value or b"[]", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return kind()
