"""The Kafka consumer of jobs: what the intake needs of it, and how the real one is configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from embedq_shared.kafka import (
    AIOKafkaConsumer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    RoundRobinPartitionAssignor,
    TopicPartition,
)


class IntakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the intake. Times as the name says; the limits of jobs and bytes in flight hold for each lane,
    and for what is started as well as for what waits."""

    group: str
    max_in_flight_jobs: int
    max_in_flight_bytes: int
    max_started_texts: int
    """Of each lane: texts of the jobs that are started and not answered."""
    max_pending_bytes: int
    """What the results of started jobs may take in memory."""
    max_poll_records: int
    max_uncommitted: int
    """Records of a partition that are started and not committed: a crash repeats these at most."""
    commit_interval_s: float
    session_timeout_ms: int
    rebalance_timeout_ms: int


class JobsConsumer(Protocol):
    """The part of `AIOKafkaConsumer` that the intake uses; a scripted one stands in for it in tests."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Leave the group and disconnect."""

    def subscribe(self, topics: Sequence[str], *, listener: ConsumerRebalanceListener) -> None:
        """Ask to join the group."""

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
        """Records of these partitions; raises one of `UNREADABLE` for a record that it cannot read."""

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Store the next offsets to read."""

    async def committed(self, partition: TopicPartition) -> int | None:
        """The stored offset."""

    async def position(self, partition: TopicPartition) -> int:
        """The next offset that a poll hands out."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Hand out this offset next."""

    async def seek_to_beginning(self, *partitions: TopicPartition) -> object:
        """Hand out the first offset that the broker has next."""

    def highwater(self, partition: TopicPartition) -> int | None:
        """The end of the partition, as of the last fetch; None before the first."""


def make_jobs_consumer(kafka: Mapping[str, Any], options: IntakeOptions) -> JobsConsumer:
    """The real one; `kafka` is what each client needs to reach the brokers. Every setting whose default is a trap is
    written out."""
    return cast(
        JobsConsumer,
        AIOKafkaConsumer(
            **kafka,
            group_id=options.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            # Not the sticky one: it may give one replica a whole lane, and nothing is kept over a rebalance anyway.
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
            session_timeout_ms=options.session_timeout_ms,
            heartbeat_interval_ms=min(3000, options.session_timeout_ms // 3),
            rebalance_timeout_ms=options.rebalance_timeout_ms,
            request_timeout_ms=options.rebalance_timeout_ms + 15_000,
            max_poll_interval_ms=600_000,
            fetch_max_wait_ms=50,
            fetch_max_bytes=32 * 1024 * 1024,
            max_partition_fetch_bytes=4 * 1024 * 1024,
            metadata_max_age_ms=60_000,
        ),
    )
