"""One record of a job topic, as it was polled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from embedq_consumer.group import Ticket
from embedq_consumer.retries import Past, past_of
from embedq_consumer.shapes import Mappings
from embedq_shared.headers import client_of
from embedq_shared.kafka import ConsumerRecord
from embedq_shared.topics import Lane

_OBJECT_BYTES: Final = 256
"""What the objects of a record take beside its bytes, and about as much for each header."""


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """A process that ended without giving up a partition, as the partition's next owner noticed it, in epoch milliseconds."""

    at_ms: int
    replica: str


class Record(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One record of a job topic, as it was polled. `polled_at` is monotonic seconds, `timestamp_ms` Kafka's.

    `past`: it comes from a retry topic; then headers and timestamp are the job's own, as it came in.
    """

    ticket: Ticket
    lane: Lane
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int
    timestamp_type: int
    polled_at: float
    client: bytes = b""
    """Whose record it is (`headers.client_of`): clients take turns."""
    size: int = _OBJECT_BYTES
    """Bytes of memory that it holds while in flight (`size_of`)."""

    past: Past | None = None
    ordered: bool = False
    """Its answer may not overtake that of an earlier record of its key, so it is not run again later either."""

    @classmethod
    def read(cls, ticket: Ticket, lane: Lane, raw: ConsumerRecord, polled_at: float) -> Record:
        """A record as the client hands it out."""
        return cls(
            ticket=ticket,
            lane=lane,
            key=raw.key,
            value=raw.value,
            headers=raw.headers,
            timestamp_ms=raw.timestamp,
            timestamp_type=raw.timestamp_type,
            polled_at=polled_at,
            client=client_of(raw.headers),
            size=size_of(raw.key, raw.value, raw.headers),
        )

    @classmethod
    def unread(cls, ticket: Ticket, lane: Lane, polled_at: float) -> Record:
        """A record that the client cannot hand out: nothing is known of it but its place."""
        return cls(
            ticket=ticket,
            lane=lane,
            key=None,
            value=None,
            headers=(),
            timestamp_ms=-1,
            timestamp_type=0,
            polled_at=polled_at,
        )

    @property
    def name(self) -> str:
        """`topic-partition-offset`: the id of a job that has none."""
        if self.past is not None:
            return f"{self.past.topic}-{self.past.partition}-{self.past.offset}"
        topic, partition = self.ticket.partition
        return f"{topic}-{partition}-{self.ticket.offset}"

    @property
    def origin(self) -> Past:
        """The record that the job came in by, itself unless it was run before."""
        if self.past is not None:
            return self.past
        partition = self.ticket.partition
        return Past(
            topic=partition.topic,
            partition=partition.partition,
            offset=self.ticket.offset,
            timestamp_ms=self.timestamp_ms,
            timestamp_type=self.timestamp_type,
        )


def size_of(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> int:
    """Bytes of memory that a record holds."""
    size = _OBJECT_BYTES * (1 + len(headers))
    if value:
        size += len(value)
    if key:
        size += len(key)
    for name, content in headers:
        size += len(name)
        if content:
            size += len(content)
    return size


def run_before(record: Record) -> Record:
    """A record of a retry topic as the job came in, with what became of it since."""
    past, headers = past_of(record.headers)
    if past is None:
        return record
    return msgspec.structs.replace(
        record,
        headers=headers,
        timestamp_ms=past.timestamp_ms,
        timestamp_type=past.timestamp_type,
        past=past,
    )


def mapped(record: Record, mappings: Mappings) -> Record:
    """A row of a mapping's topic with whose it is, and whether its answer keeps its key's order; another record as it is."""
    mapping = mappings.of_topic(record.origin.topic) if mappings else None
    if mapping is None:
        return record
    return msgspec.structs.replace(
        record,
        client=f"map {mapping.name}".encode(),
        # One that is run again is out of its order already.
        ordered=mapping.keeps_order and record.key is not None and record.past is None,
    )
