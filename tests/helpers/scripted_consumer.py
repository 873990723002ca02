"""A consumer of jobs without a broker: it hands out what a test wrote into its partitions, with aiokafka's habits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError


class ScriptedConsumer:
    """One member of a group whose rebalances the test makes.

    The habits that matter: a poll asks its partitions in their order and takes all it can of the first; one that meets a
    record which it cannot read raises, and what it had taken of the others before is lost; while partitions are
    reassigned, no poll returns; a poll that is cancelled has moved no position.
    """

    def __init__(self, *, blocks: bool = False) -> None:
        self.blocks = blocks
        """An empty poll that may wait returns when a record arrives, and not before; else after a moment."""
        self.polls: list[tuple[TopicPartition, ...]] = []
        self.limits: list[int] = []
        self.timeouts_ms: list[int] = []
        self.calls: list[str] = []
        self.commits: list[dict[TopicPartition, int]] = []
        self.commit_errors: list[BaseException] = []
        self.commit_gate: asyncio.Event | None = None
        """A commit waits for it."""
        self.stored: dict[TopicPartition, int] = {}
        self.positions: dict[TopicPartition, int] = {}
        self.ends: dict[TopicPartition, int] = {}
        self.subscribed: Sequence[str] = ()
        self.stop_error: BaseException | None = None
        self._records: dict[TopicPartition, dict[int, ConsumerRecord | None]] = {}
        self._arrived = asyncio.Event()
        self._assigned = asyncio.Event()
        self._assigned.set()
        self._given_up = False
        self._committing = False
        self._listener: ConsumerRebalanceListener | None = None
        self._client = _Connections()  # what the Kafka room closes after a stop that failed

    # -- the test's side ------------------------------------------------------------------------------------------------

    def write(
        self, partition: TopicPartition, *values: bytes | None, at: int | None = None, client: bytes = b""
    ) -> None:
        """Add records of this client from offset `at` on; None is a record that the consumer cannot read."""
        log = self._records.setdefault(partition, {})
        offset = self.ends.get(partition, 0) if at is None else at
        for number, value in enumerate(values, offset):
            log[number] = None if value is None else _record(partition, number, value, client)
        self.ends[partition] = offset + len(values)
        self._arrived.set()

    def write_gap(self, partition: TopicPartition, length: int = 1) -> None:
        """Offsets that are no records, as transactions' markers and compaction leave them."""
        self.ends[partition] = self.ends.get(partition, 0) + length
        self._arrived.set()

    async def rebalance(self, *partitions: TopicPartition) -> None:
        """As the client does it: tell the listener, give up the old partitions, have new ones, tell the listener."""
        await self.revoke()
        await self.assign(*partitions)

    async def revoke(self) -> None:
        assert self._listener is not None
        self._assigned.clear()
        await self._listener.on_partitions_revoked(set(self.positions))
        self._given_up = True
        self.calls.append("given_up")

    async def assign(self, *partitions: TopicPartition) -> None:
        assert self._listener is not None
        self.positions = {partition: self.stored.get(partition, 0) for partition in partitions}
        self._given_up = False
        self._assigned.set()  # before the listener: a poll may return before it has heard of the assignment
        await self._listener.on_partitions_assigned(set(partitions))
        self.calls.append("assigned")

    @property
    def latest(self) -> tuple[TopicPartition, ...]:
        """The partitions of the latest poll; none before the first."""
        return self.polls[-1] if self.polls else ()

    # -- the intake's side ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")
        if self.stop_error is not None:
            raise self.stop_error

    def subscribe(self, topics: Sequence[str], *, listener: ConsumerRebalanceListener) -> None:
        self.subscribed = topics
        self._listener = listener

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
        assert partitions, "an empty poll asks for all partitions, held and full ones too"
        assert max_records >= 1
        self.polls.append(partitions)
        self.limits.append(max_records)
        self.timeouts_ms.append(timeout_ms)
        self.calls.append("poll")
        await self._assigned.wait()
        if found := self._take(partitions, max_records):
            return found
        if timeout_ms:
            self._arrived.clear()
            try:
                async with asyncio.timeout(None if self.blocks else 0.001):
                    await self._arrived.wait()
            except TimeoutError:
                return {}
        return self._take(partitions, max_records)

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        assert not self._given_up, "a commit of partitions that were given up"
        assert not self._committing, "two commits at a time"
        if self.commit_gate is not None:
            self._committing = True
            try:
                await self.commit_gate.wait()
            finally:
                self._committing = False
        if self.commit_errors:
            raise self.commit_errors.pop(0)
        self.commits.append(dict(offsets))
        self.stored |= offsets
        self.calls.append("commit")

    async def committed(self, partition: TopicPartition) -> int | None:
        return self.stored.get(partition)

    async def position(self, partition: TopicPartition) -> int:
        if partition not in self.positions:
            raise IllegalStateError(f"{partition} is not assigned")
        return self.positions[partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.positions:
            raise IllegalStateError(f"{partition} is not assigned")
        self.positions[partition] = offset

    async def seek_to_beginning(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            self.seek(partition, 0)

    def highwater(self, partition: TopicPartition) -> int | None:
        return self.ends.get(partition)

    def _take(
        self, partitions: Sequence[TopicPartition], limit: int
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        found: dict[TopicPartition, list[ConsumerRecord]] = {}
        for partition in partitions:
            if partition not in self.positions or not limit:
                continue
            log = self._records.get(partition, {})
            taken: list[ConsumerRecord] = []
            position = self.positions[partition]
            while position < self.ends.get(partition, 0) and len(taken) < limit:
                if position in log:
                    record = log[position]
                    if record is None:
                        # The records before it are withheld, and this partition's position has not moved.
                        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
                    taken.append(record)
                position += 1
            self.positions[partition] = position
            if taken:
                found[partition] = taken
                limit -= len(taken)
        return found


class _Connections:
    async def close(self) -> None:
        """There are none."""


def _record(partition: TopicPartition, offset: int, value: bytes, client: bytes) -> ConsumerRecord:
    return ConsumerRecord(
        topic=partition.topic,
        partition=partition.partition,
        offset=offset,
        timestamp=1_700_000_000_000,
        timestamp_type=0,
        key=b"key",
        value=value,
        checksum=None,
        serialized_key_size=3,
        serialized_value_size=len(value),
        headers=(("name", b"header"), *([("client-id", client)] if client else [])),
    )
