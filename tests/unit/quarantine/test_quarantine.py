"""The loop around `Suspects`: what it commits, before it hands over what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import pytest
from aiokafka.errors import KafkaConnectionError

from embedq_consumer.group import Ticket
from embedq_consumer.intake.records import Death, Record
from embedq_consumer.quarantine import Claimant, Quarantine, Suspects, quarantine
from embedq_consumer.quarantine.custody import Custody, decode, encode
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import TopicPartition
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until

A, B = TopicPartition("t.jobs", 0), TopicPartition("t.jobs", 1)
DEAD = Custody(owner="dead", replica="one", span=10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(quarantine, "_PAUSE_S", 0.005)


def record(offset: int, partition: TopicPartition = A, epoch: int = 1) -> Record:
    return Record(
        ticket=Ticket(partition, epoch, offset),
        lane="interactive",
        key=None,
        value=b"{}",
        headers=(),
        timestamp_ms=0,
        timestamp_type=0,
        polled_at=0.0,
    )


class Parts:
    """Commits that are kept here, and work that a test finishes. `events` has both, in order."""

    def __init__(self, *, group: int = 2) -> None:
        self.metrics = Metrics()
        self.suspects = Suspects(Claimant(owner="me", replica="two", span=10), group=group)
        self.stored: dict[TopicPartition, tuple[int | None, str]] = {}
        self.epoch = 1
        self.gate = asyncio.Event()
        self.gate.set()
        self.read_errors: list[Exception] = []
        self.refusals = 0
        self.events: list[object] = []
        self.finished: list[int] = []
        self.parked: list[Record] = []
        self.out_of_turn: list[int] = []
        self.held = asyncio.Event()
        self.held.set()
        self.quarantine = Quarantine(self.suspects, self, self, self.metrics)
        self.quarantine.hand_to(self)

    def finish(self, *records: Record) -> None:
        self.finished += [record.ticket.offset for record in records]

    def park(self, records: Iterable[Record]) -> None:
        self.parked += records
        self.quarantine_may_start()

    def quarantine_may_start(self) -> None:
        if self.parked and self.quarantine.is_open:
            records, self.parked = self.parked, []
            self.quarantine.start(records)

    def start(self, record: Record) -> None:
        self.out_of_turn.append(record.ticket.offset)

    def start_more(self) -> None:
        self.quarantine_may_start()

    @property
    def waits(self) -> bool:
        return bool(self.parked)

    async def running(self) -> None:
        await self.held.wait()

    def is_current(self, partition: TopicPartition, epoch: int) -> bool:
        return epoch == self.epoch

    async def write(self, partitions: Collection[TopicPartition]) -> bool:
        await self.gate.wait()
        if self.refusals:
            self.refusals -= 1
            return False
        for partition in partitions:
            text = self.suspects.metadata(partition, release=False)
            assert text is not None
            self.stored[partition] = (0, text)
            custody = decode(text)
            self.events.append(("mark", custody.trial_until, custody.alone))
        return True

    async def read(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int | None, str]]:
        if self.read_errors:
            raise self.read_errors.pop()
        return {partition: self.stored.get(partition, (None, "")) for partition in partitions}

    async def ends(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 100)

    def take(self, records: Iterable[Record]) -> None:
        self.events.append([one.ticket.offset for one in records])

    def take_unreadable(self, record: Record, why: str) -> None:
        self.events.append((record.ticket.offset, why))

    def condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        self.events.append((record.ticket.offset, len(deaths)))

    async def saw(self, *events: object) -> None:
        await wait_until(lambda: len(self.events) >= len(events), what=f"{events} (there is {self.events})")
        assert self.events == list(events)


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[Parts]:
    loop = asyncio.create_task(parts.quarantine.run())
    try:
        yield parts
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop


async def test_a_partitions_first_records_wait_for_a_commit_and_the_next_ones_for_nothing() -> None:
    parts = Parts()
    parts.gate.clear()
    async with running(parts):
        parts.quarantine.take([record(1), record(2)])
        await asyncio.sleep(0)
        assert parts.events == []
        parts.gate.set()
        await parts.saw(("mark", 0, False), [1, 2])
        parts.quarantine.take([record(3)])
        assert parts.events[2:] == [[3]], "at once"
    assert decode(parts.stored[A][1]).owner == "me"


async def test_after_a_death_suspects_run_in_groups_each_after_its_mark() -> None:
    parts = Parts()
    parts.stored[A] = (0, encode(DEAD))
    async with running(parts):
        parts.quarantine.take([record(offset) for offset in range(3)])
        await parts.saw(("mark", 2, False), [0, 1])
        await wait_until(lambda: sample_value(parts.metrics.registry, "embedq_suspected_partitions") == 1)
        parts.quarantine.finish(record(0))
        parts.quarantine.finish(record(1))
        await parts.saw(("mark", 2, False), [0, 1], ("mark", 3, False), [2])
    assert parts.finished == [0, 1]
    assert parts.out_of_turn == [0, 1, 2]
    assert sample_value(parts.metrics.registry, "embedq_deaths_total") == 1


async def test_a_record_that_killed_alone_is_condemned_with_its_history() -> None:
    parts = Parts()
    deaths = (Death(at_ms=1, replica="one"), Death(at_ms=2, replica="two"))
    guilty = Custody(
        owner="dead",
        replica="one",
        deaths=deaths,
        accused_until=1,
        accusations=1,
        alone_until=9,
        trial_until=1,
        alone=True,
    )
    parts.stored[A] = (0, encode(guilty))
    async with running(parts):
        parts.quarantine.take([record(0), record(1)])
        await parts.saw(("mark", 0, False), (0, 3))
        parts.quarantine.finish(record(0))
        await parts.saw(("mark", 0, False), (0, 3), ("mark", 2, True), [1])


async def test_a_mark_that_the_brokers_do_not_take_is_written_again_before_anything_runs() -> None:
    parts = Parts()
    parts.refusals = 2
    async with running(parts):
        parts.quarantine.take([record(1)])
        await parts.saw(("mark", 0, False), [1])


async def test_commits_that_cannot_be_read_are_read_again() -> None:
    parts = Parts()
    parts.read_errors = [KafkaConnectionError(), TimeoutError()]
    async with running(parts):
        parts.quarantine.take([record(1)])
        await parts.saw(("mark", 0, False), [1])


async def test_what_was_held_of_a_partition_that_is_given_up_is_let_go() -> None:
    parts = Parts()
    parts.refusals = 1_000_000
    async with running(parts):
        parts.quarantine.take([record(1), record(2)])
        await wait_until(lambda: parts.refusals < 1_000_000)
        parts.epoch = 2
        await wait_until(lambda: parts.finished == [1, 2], what="both let go")
        parts.refusals = 0
        parts.quarantine.take([record(1, epoch=2)])
        await parts.saw(("mark", 0, False), [1])


async def test_while_nothing_may_be_started_no_suspect_is() -> None:
    parts = Parts()
    parts.stored[A] = (0, encode(DEAD))
    parts.held.clear()
    async with running(parts):
        parts.quarantine.take([record(0)])
        await wait_until(lambda: parts.suspects.suspected == 1)
        assert parts.events == []
        parts.held.set()
        await parts.saw(("mark", 1, False), [0])


async def test_what_waits_for_its_turn_waits_for_a_suspect_that_runs_alone() -> None:
    parts = Parts()
    parts.stored[B] = (0, encode(Custody(owner="dead", replica="one", span=10, alone_until=5)))
    async with running(parts):
        parts.quarantine.take([record(1)])
        await parts.saw(("mark", 0, False), [1])
        parts.quarantine.finish(record(1))
        parts.quarantine.take([record(0, B)])
        await parts.saw(("mark", 0, False), [1], ("mark", 1, True), [0])
        assert not parts.quarantine.is_open
        parts.park([record(2)])
        assert parts.waits
        parts.quarantine.finish(record(0, B))
        await wait_until(lambda: not parts.waits, what="its turn")
        assert parts.events[4:] == [("mark", 0, False), [2]]


async def test_an_unreadable_record_is_rejected_as_such() -> None:
    parts = Parts()
    async with running(parts):
        parts.quarantine.take_unreadable(record(1), "why")
        await parts.saw(("mark", 0, False), (1, "why"))
