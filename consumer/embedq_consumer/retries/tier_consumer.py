"""A consumer of jobs that hands out records of retry topics when they are due, and all others as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

from embedq_consumer.retries.tiers import RetryTiers
from embedq_consumer.retries.waiting import WaitingRecords
from embedq_shared.kafka import ConsumerRecord, TopicPartition

_PolledRecords = Mapping[TopicPartition, Sequence[ConsumerRecord]]

_LEAST_PAUSE_S: Final = 0.001


class _Consumer(Protocol):
    """The same without tiers: the intake's `JobsConsumer`, which stands on a higher floor."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Disconnect."""

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Read these and no others."""

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> _PolledRecords:
        """Records of these partitions."""

    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions begin."""

    async def end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end."""

    async def position(self, partition: TopicPartition) -> int:
        """The next offset that a poll hands out."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Hand out this offset next."""

    def highwater(self, partition: TopicPartition) -> int | None:
        """The end of an assigned partition."""


class TierConsumer:
    """The consumer within, and the records that wait.

    Nothing is paused in the client and nobody sleeps: a partition whose first record is not due yet is left out of its polls.
    One poll at a time, and `assign` and `seek` between polls.
    """

    def __init__(
        self,
        consumer: _Consumer,
        tiers: RetryTiers,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._consumer = consumer
        self._waiting = WaitingRecords(tiers)
        self._clock = clock
        self._wall_clock = wall_clock

    async def start(self) -> None:
        """Connect."""
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self._consumer.stop()

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Read these and no others. Forgets every position and all that was fetched."""
        self._waiting.forget_all()
        self._consumer.assign(partitions)

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> _PolledRecords:
        """Records of these partitions that are due; waits until then, or `timeout_ms`. Cancelled, it has moved no position."""
        timeout_s = self._until_due(partitions, timeout_ms / 1000)
        if readable := [partition for partition in partitions if not self._waiting.holds(partition)]:
            polled = await self._consumer.getmany(
                *readable, timeout_ms=int(timeout_s * 1000), max_records=max_records
            )
        else:
            polled = {}
            await asyncio.sleep(timeout_s)
        # No await from here on: what was polled is handed out, or kept.
        now = self._clock()
        found = self._waiting.put(polled, now, self._wall_clock() * 1000)
        left = max_records - sum(map(len, found.values()))
        return found | self._waiting.take(partitions, left, now)

    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions begin; raises `KafkaError`."""
        return await self._consumer.beginning_offsets(partitions)

    async def end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end; raises `KafkaError`."""
        return await self._consumer.end_offsets(partitions)

    async def position(self, partition: TopicPartition) -> int:
        """The next offset that a poll hands out."""
        first = self._waiting.position(partition)
        return await self._consumer.position(partition) if first is None else first

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Hand out this offset next."""
        self._waiting.forget(partition)
        self._consumer.seek(partition, offset)

    def highwater(self, partition: TopicPartition) -> int | None:
        """The end of an assigned partition, as of the last fetch; None before the first."""
        return self._consumer.highwater(partition)

    def _until_due(self, partitions: Collection[TopicPartition], timeout_s: float) -> float:
        """Seconds to wait at most: what waits may be due before."""
        due = self._waiting.next_due(partitions)
        if due is None or not timeout_s:
            return timeout_s
        return min(timeout_s, max(_LEAST_PAUSE_S, due - self._clock()))
