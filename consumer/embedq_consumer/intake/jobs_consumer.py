"""The Kafka clients of the intake: what it needs of them, and how the real ones are configured.

Two of them: one is the group's member and reads nothing, the other reads what the member was assigned and knows no group.
So a rebalance, which may take as long as a dead member's session, stops nobody who reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from embedq_consumer.group import Member, make_member
from embedq_consumer.retries import RetryTiers, TierConsumer
from embedq_consumer.shapes import Mappings
from embedq_shared.kafka import (
    DEFAULT_MAX_INFLATED_BYTES,
    BoundedConsumer,
    ConsumerRecord,
    TopicPartition,
)

PolledRecords = Mapping[TopicPartition, Sequence[ConsumerRecord]]


class IntakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the intake. Times as the name says; the limits of jobs and bytes in flight hold for each lane,
    and for what is started as well as for what waits."""

    group: str
    replica: str
    static_membership: bool
    max_in_flight_jobs: int
    max_in_flight_bytes: int
    read_ahead_s: float
    """Started work, in seconds of what the lane answers at its best of late."""
    max_started_texts: int
    """Of each lane: texts of the jobs that are started and not answered."""
    max_pending_bytes: int
    """What the results of started jobs may take in memory."""
    max_poll_records: int
    bulk_in_order: bool = False
    """Each partition of the bulk lane starts its jobs in their order, since its answers are published in it."""
    max_uncommitted: int
    """Records of a partition that are started and not committed: a crash repeats these at most."""
    commit_interval_s: float
    session_timeout_ms: int
    rebalance_timeout_ms: int
    stuck_after_s: float
    """A watermark that was overtaken for so long is a reason not to be ready."""
    stuck_limit_s: float
    """And after so long its record is given up."""
    max_inflated_bytes: int = DEFAULT_MAX_INFLATED_BYTES
    """Of one compressed batch of records."""
    retries: RetryTiers = RetryTiers()
    mappings: Mappings = Mappings()
    """Whose topics are read, too."""


class JobsConsumer(Protocol):
    """The part of `BoundedConsumer` that the intake uses; a scripted one stands in for it in tests."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Disconnect."""

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Read these and no others. Forgets every position and all that was fetched."""

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> PolledRecords:
        """Records of these partitions; what cannot be read has an `Unreadable` as its value."""

    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions begin; raises `KafkaError`."""

    async def end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end; raises `KafkaError`."""

    async def position(self, partition: TopicPartition) -> int:
        """The next offset that a poll hands out."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Hand out this offset next."""

    def highwater(self, partition: TopicPartition) -> int | None:
        """The end of an assigned partition, as of the last fetch; None before the first."""


class JobsClients(msgspec.Struct, frozen=True):
    """Both clients."""

    consumer: JobsConsumer
    member: Member


def make_jobs_clients(kafka: Mapping[str, Any], options: IntakeOptions) -> JobsClients:
    """The real ones; `kafka` is what each client needs to reach the brokers."""
    member = make_member(
        kafka,
        group=options.group,
        replica=options.replica,
        static=options.static_membership,
        session_timeout_ms=options.session_timeout_ms,
        rebalance_timeout_ms=options.rebalance_timeout_ms,
    )
    consumer = _make_consumer(kafka, options)
    tiers = options.retries
    return JobsClients(TierConsumer(consumer, tiers) if tiers.topics else consumer, member)


def _make_consumer(kafka: Mapping[str, Any], options: IntakeOptions) -> JobsConsumer:
    """Every setting whose default is a trap is written out."""
    return cast(
        JobsConsumer,
        BoundedConsumer(
            **kafka,
            max_inflated_bytes=options.max_inflated_bytes,
            client_id=options.replica,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=50,
            fetch_max_bytes=32 * 1024 * 1024,
            max_partition_fetch_bytes=4 * 1024 * 1024,
            metadata_max_age_ms=60_000,
        ),
    )
