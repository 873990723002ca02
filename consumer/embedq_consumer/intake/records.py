"""One record of a job topic, as it was polled."""

from __future__ import annotations

import msgspec

from embedq_consumer.group import Ticket
from embedq_consumer.retries import Past, past_of
from embedq_shared.topics import Lane


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
    past: Past | None = None

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
        origin = self.origin
        return f"{origin.topic}-{origin.partition}-{origin.offset}"

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

    @property
    def size(self) -> int:
        """Bytes that it holds while in flight."""
        headers = sum(len(name) + len(value or b"") for name, value in self.headers)
        return len(self.value or b"") + len(self.key or b"") + headers


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
