"""The intake's two Kafka clients without a broker: a consumer that hands out what a test wrote into its partitions, with
aiokafka's habits, and a group membership whose rebalances the test makes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalGenerationError, IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from embedq_consumer.group.assignor import encode_release
from embedq_shared.kafka import Follower, Membership, Unreadable

Headers = Sequence[tuple[str, bytes | None]]


class ScriptedMember:
    """A member of a group of which the test is the coordinator.

    The habits that matter: a commit that shows another membership than the present one is refused; what was stored is
    where the partition's next owner begins.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.commits: list[dict[TopicPartition, int]] = []
        self.commit_errors: list[BaseException] = []
        self.commit_gate: asyncio.Event | None = None
        """A commit waits for it."""
        self.open_gate: asyncio.Event | None = None
        """A question for stored offsets waits for it."""
        self.open_errors: list[BaseException] = []
        self.stored: dict[TopicPartition, int] = {}
        self.metadata: dict[TopicPartition, str] = {}
        """That came with them."""
        self.ids: dict[str, str] = {}
        """Of the topics, as the brokers have them now."""
        self.id_errors: list[BaseException] = []
        self.missing: frozenset[TopicPartition] = frozenset()
        """Partitions of deleted topics."""
        self.topics: list[str] = []
        self.membership: Membership | None = None
        self.failure: BaseException | None = None
        self.problem: str | None = None
        self._follower: Follower | None = None
        self._generation = 0
        self._committing = False

    # -- the test's side ------------------------------------------------------------------------------------------------

    @property
    def risen(self) -> list[dict[TopicPartition, int]]:
        """The commits, without those of where a partition began: such a one comes if half a second passes before the first record is
        finished, as it may on a machine that has other work."""
        return [commit for commit in self.commits if any(commit.values())]

    @property
    def follower(self) -> Follower:
        assert self._follower is not None, "has not joined"
        return self._follower

    def assign(self, *partitions: TopicPartition, release: Collection[TopicPartition] = ()) -> Membership:
        """A rebalance that gives these, and asks for those of `release` to be given up."""
        self.next_generation()
        self.settle(*partitions, release=release)
        assert self.membership is not None
        return self.membership

    def next_generation(self) -> None:
        """The rebalance is over for the coordinator, and the member has not heard of it: no commit is taken any more."""
        self._generation += 1
        self.membership = Membership("me", self._generation)

    def settle(self, *partitions: TopicPartition, release: Collection[TopicPartition] = ()) -> None:
        """And now it has."""
        assert self.membership is not None
        self.follower.assigned(
            self.membership, frozenset(partitions), encode_release(release) if release else b""
        )

    def expel(self) -> None:
        self.membership = None
        self.follower.expelled()

    # -- the intake's side ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.calls.append("start")

    def join(self, topics: Iterable[str], follower: Follower) -> None:
        self.topics = list(topics)
        self._follower = follower
        self.calls.append("join")

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def rejoin(self) -> None:
        self.calls.append("rejoin")

    async def commit(
        self, membership: Membership, offsets: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> Collection[TopicPartition]:
        assert not self._committing, "two commits at a time"
        if self.commit_gate is not None:
            self._committing = True
            try:
                await self.commit_gate.wait()
            finally:
                self._committing = False
        if self.commit_errors:
            raise self.commit_errors.pop(0)
        if membership != self.membership:
            raise IllegalGenerationError
        offsets = {partition: its for partition, its in offsets.items() if partition not in self.missing}
        plain = {partition: stored.offset for partition, stored in offsets.items()}
        self.commits.append(plain)
        self.stored |= plain
        self.metadata |= {partition: stored.metadata for partition, stored in offsets.items()}
        self.calls.append("commit")
        return self.missing

    async def committed(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata | None]:
        found = {
            partition: OffsetAndMetadata(self.stored[partition], self.metadata.get(partition, ""))
            if partition in self.stored
            else None
            for partition in partitions
        }
        if self.open_gate is not None:
            await self.open_gate.wait()
        if self.open_errors:
            raise self.open_errors.pop(0)
        self.calls.append("committed")
        return found

    async def topic_ids(self, topics: Collection[str]) -> Mapping[str, str]:
        self.calls.append("topic_ids")
        if self.id_errors:
            raise self.id_errors.pop(0)
        return {topic: its for topic, its in self.ids.items() if topic in topics}

    async def close(self, within: float) -> str | None:
        self.calls.append("close")
        return self.problem


class ScriptedConsumer:
    """A consumer without a group.

    The habits that matter: a poll asks its partitions in their order and takes all it can of the first; a record that
    cannot be read comes with an `Unreadable` as its value; an assignment forgets all positions; a poll that is cancelled
    has moved no position.
    """

    def __init__(self, *, blocks: bool = False) -> None:
        self.blocks = blocks
        """An empty poll that may wait returns when a record arrives, and not before; else after a moment."""
        self.polls: list[tuple[TopicPartition, ...]] = []
        self.limits: list[int] = []
        self.timeouts_ms: list[int] = []
        self.calls: list[str] = []
        self.positions: dict[TopicPartition, int] = {}
        self.ends: dict[TopicPartition, int] = {}
        self.beginnings: dict[TopicPartition, int] = {}
        """As the brokers tell them; what is polled does not follow from it."""
        self.beginning_errors: list[BaseException] = []
        self.stop_error: BaseException | None = None
        self._records: dict[TopicPartition, dict[int, ConsumerRecord]] = {}
        self._arrived = asyncio.Event()
        self._client = _Connections()  # what the Kafka room closes after a stop that failed

    # -- the test's side ------------------------------------------------------------------------------------------------

    def write(
        self,
        partition: TopicPartition,
        *values: bytes | None,
        at: int | None = None,
        client: bytes = b"",
        headers: Headers = (("name", b"header"),),
    ) -> None:
        """Add records of this client from offset `at` on; None is a record that the consumer cannot read."""
        log = self._records.setdefault(partition, {})
        offset = self.ends.get(partition, 0) if at is None else at
        for number, value in enumerate(values, offset):
            what = Unreadable(number, "why") if value is None else value
            log[number] = _record(
                partition, number, what, (*headers, ("client-id", client)) if client else headers
            )
        self.ends[partition] = offset + len(values)
        self._arrived.set()

    def write_gap(self, partition: TopicPartition, length: int = 1) -> None:
        """Offsets that are no records, as transactions' markers and compaction leave them."""
        self.ends[partition] = self.ends.get(partition, 0) + length
        self._arrived.set()

    def make_anew(self, partition: TopicPartition) -> None:
        """Its topic was deleted and made again: nothing is there."""
        self._records[partition] = {}
        self.ends[partition] = 0

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

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        self.positions = dict.fromkeys(partitions, 0)
        self.calls.append("assign")

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
        assert partitions, "an empty poll asks for all partitions, held and full ones too"
        assert max_records >= 1
        self.polls.append(partitions)
        self.limits.append(max_records)
        self.timeouts_ms.append(timeout_ms)
        self.calls.append("poll")
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

    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        if self.beginning_errors:
            raise self.beginning_errors.pop(0)
        return {partition: self.beginnings.get(partition, 0) for partition in partitions}

    async def end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {partition: self.ends.get(partition, 0) for partition in partitions}

    async def position(self, partition: TopicPartition) -> int:
        if partition not in self.positions:
            raise IllegalStateError(f"{partition} is not assigned")
        return self.positions[partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.positions:
            raise IllegalStateError(f"{partition} is not assigned")
        self.positions[partition] = offset

    def highwater(self, partition: TopicPartition) -> int | None:
        assert partition in self.positions, "not assigned"
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
            if position > self.ends.get(partition, 0):
                position = 0  # out of range, and so the earliest
            while position < self.ends.get(partition, 0) and len(taken) < limit:
                if position in log:
                    taken.append(log[position])
                position += 1
            self.positions[partition] = position
            if taken:
                found[partition] = taken
                limit -= len(taken)
        return found


class _Connections:
    hosts = ()
    _sasl_mechanism = "PLAIN"

    async def close(self) -> None:
        """There are none."""


def _record(partition: TopicPartition, offset: int, value: bytes, headers: Headers) -> ConsumerRecord:
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
        headers=headers,
    )
