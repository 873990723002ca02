"""The intake without a broker: every habit of the client that its comments name, and what the loop makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedq_consumer.fairness import Cost
from embedq_consumer.group import Overtaken, offset_committer, topic_watch
from embedq_consumer.group.assignor import Claim, decode_claim
from embedq_consumer.intake import reading, workload
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsClients
from embedq_consumer.intake.poll_loop import Gate, Intake
from embedq_consumer.intake.records import Record
from embedq_consumer.retries import Past, RetryTiers, Tier, TierConsumer, headers_of
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Topics
from tests.helpers.metric_values import sample_value
from tests.helpers.scripted_consumer import ScriptedConsumer, ScriptedMember
from tests.helpers.support import wait_until

TOPICS = Topics("t")
A, B = TopicPartition(TOPICS.jobs, 0), TopicPartition(TOPICS.jobs, 1)
BULK, OTHER_BULK = TopicPartition(TOPICS.bulk, 0), TopicPartition(TOPICS.bulk, 1)


@pytest.fixture(autouse=True)
def turns_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nothing asks for: of a loop that has nothing to poll, and of commits, with which the places of gaps go along."""
    monkeypatch.setattr(reading, "POLL_MS", 20)
    monkeypatch.setattr(offset_committer, "_IDLE_S", 0.02)


class Harness:
    """An intake over a scripted consumer. What it takes is answered at once, or when the test says so."""

    def __init__(self, consumer: ScriptedConsumer, *, answer: bool = True, **options: Any) -> None:
        self.consumer = consumer
        self.member = ScriptedMember()
        self.answer = answer
        self.cost: Cost | None = None
        """What each job turns out to take."""
        self.gate: Gate | None = None
        self.taken: list[Record] = []
        self.unreadable: list[tuple[str, str]] = []
        self.beats = 0
        self.metrics = Metrics()
        defaults: dict[str, Any] = {
            "group": "g",
            "replica": "r",
            "static_membership": False,
            "max_in_flight_jobs": 100,
            "max_in_flight_bytes": 10_000_000,
            "max_started_texts": 10_000,
            "max_pending_bytes": 1_000_000_000,
            "read_ahead_s": 60.0,
            "max_poll_records": 10,
            "max_uncommitted": 1000,
            "commit_interval_s": 0.001,
            "session_timeout_ms": 6000,
            "rebalance_timeout_ms": 60_000,
            "stuck_after_s": 60.0,
            "stuck_limit_s": 600.0,
        }
        self.intake = Intake(
            JobsClients(consumer, self.member),
            IntakeOptions(**defaults | options),
            topics=TOPICS,
            metrics=self.metrics,
            beat=self._beat,
        )
        self.polling: asyncio.Task[None]
        self.committing: asyncio.Task[None]

    @asynccontextmanager
    async def running(
        self, *partitions: TopicPartition, fails_with: type[Exception] | None = None
    ) -> AsyncIterator[None]:
        """The loop runs, as a member that was given these partitions. `fails_with`: it ends itself, by this error."""
        await self.intake.open()
        self.polling = asyncio.create_task(self.intake.run(self.take, self.step_over, self.gate))
        self.committing = asyncio.create_task(self.intake.commit_forever())
        try:
            await self.assign(*partitions)
            yield
        finally:
            for task in (self.polling, self.committing):
                task.cancel()
                with suppress(asyncio.CancelledError, *([fails_with] if fails_with else [])):
                    await task

    async def assign(self, *partitions: TopicPartition, release: Collection[TopicPartition] = ()) -> None:
        """A rebalance, and the partitions are read."""
        self.member.assign(*partitions, release=release)
        await self.until_read(*partitions)

    async def until_read(self, *partitions: TopicPartition) -> None:
        await wait_until(
            lambda: self.consumer.positions.keys() == set(partitions), what="the partitions that are read"
        )

    def _beat(self) -> None:
        self.beats += 1

    def take(self, records: Iterable[Record]) -> None:
        for record in records:
            self.taken.append(record)
            if self.cost is not None:
                self.intake.weigh(record, self.cost)
            if self.answer:
                self.finish(record)

    def step_over(self, record: Record, why: str) -> None:
        self.unreadable.append((record.name, why))
        self.finish(record)

    def finish(self, *records: Record) -> None:
        for record in records:
            self.intake.finish(record)

    @property
    def names(self) -> list[str]:
        return [record.name for record in self.taken]

    async def until_taken(self, count: int) -> None:
        await wait_until(lambda: len(self.taken) >= count, what=f"{count} records")

    async def a_turn(self) -> None:
        """At least one whole turn of the loop from now on."""
        beats = self.beats
        await wait_until(lambda: self.beats >= beats + 2, what="two turns")

    def value(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, name, labels)


def values(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def place(partition: TopicPartition, offset: int) -> str:
    return f"{partition.topic}-{partition.partition}-{offset}"


async def _steps() -> None:
    """The event loop does all that it can do without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


# -- records ------------------------------------------------------------------------------------------------------------


async def test_a_record_is_handed_over_as_it_was_polled() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(BULK, b"value")
    async with running.running(BULK):
        await running.until_taken(1)
    [record] = running.taken
    assert (record.name, record.lane) == (place(BULK, 0), "bulk")
    assert (record.key, record.value, record.headers) == (b"key", b"value", (("name", b"header"),))
    assert (record.timestamp_ms, record.timestamp_type) == (1_700_000_000_000, 0)


async def test_it_asks_for_both_lanes() -> None:
    running = Harness(ScriptedConsumer())
    await running.intake.open()
    assert running.consumer.calls == ["start"]
    assert running.member.calls == ["start", "join"]
    assert running.member.topics == list(TOPICS.lanes)


async def test_it_says_that_it_has_joined_even_if_no_partition_is_left_for_it() -> None:
    running = Harness(ScriptedConsumer())
    assert not running.intake.joined.is_set()
    async with running.running():
        assert running.intake.joined.is_set()


async def test_what_is_polled_in_flight_and_assigned_is_counted() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_in_flight_jobs=3)
    running.consumer.write(A, *values(3))
    running.consumer.write(BULK, b"12345")
    async with running.running(A, BULK):
        await running.until_taken(4)
        await running.a_turn()
        assert running.value("embedq_records_total", lane="interactive") == 3
        assert running.value("embedq_records_total", lane="bulk") == 1
        assert running.value("embedq_in_flight_jobs", lane="interactive") == 3
        assert running.value("embedq_in_flight_jobs", lane="bulk") == 1
        assert running.value("embedq_in_flight_bytes", lane="bulk") == sum(
            record.size for record in running.taken if record.lane == "bulk"
        )
        assert running.value("embedq_paused", lane="interactive") == 1
        assert running.value("embedq_paused", lane="bulk") == 0
        assert running.intake.is_full("interactive")
        running.finish(*running.taken)
        await running.a_turn()
        assert running.value("embedq_in_flight_jobs", lane="interactive") == 0
        assert running.value("embedq_paused", lane="interactive") == 0
        assert running.value("embedq_assigned_partitions") == 2
        assert running.value("embedq_rebalances_total") == 1
        await running.assign(A)
        assert running.value("embedq_assigned_partitions") == 1
        assert running.value("embedq_rebalances_total") == 2


async def test_every_turn_is_a_heartbeat_while_there_is_nothing_to_read() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        beats = running.beats
        await wait_until(lambda: running.beats > beats + 2, what="heartbeats")


# -- which partitions are polled ------------------------------------------------------------------------------------------


async def test_a_replica_without_partitions_polls_nothing_and_its_loop_lives() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running():
        beats = running.beats
        await wait_until(lambda: running.beats > beats + 1, what="turns of the loop")
        assert running.consumer.polls == []


async def test_a_full_lane_is_left_out_of_polls_until_half_of_it_is_answered() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False, max_in_flight_jobs=4)
    running.consumer.write(A, *values(9))
    async with running.running(A, BULK):
        await running.until_taken(4)
        await wait_until(lambda: running.consumer.latest == (BULK,), what="a poll of the other lane")
        running.consumer.write(BULK, b"meanwhile")
        await running.until_taken(5)
        running.finish(running.taken[0])
        assert A not in running.consumer.latest
        running.finish(running.taken[1])  # half: the poll under way, which asks for bulk records alone, ends
        await running.until_taken(7)
        assert running.names[5:7] == [place(A, 4), place(A, 5)]


async def test_with_every_lane_full_nothing_is_polled() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False, max_in_flight_jobs=1)
    running.consumer.write(A, *values(2))
    running.consumer.write(BULK, *values(2))
    async with running.running(A, BULK):
        await running.until_taken(2)
        polls, beats = len(running.consumer.polls), running.beats
        await wait_until(lambda: running.beats > beats + 1, what="turns of the loop")
        assert len(running.consumer.polls) <= polls + 1
        running.finish(*running.taken)
        await running.until_taken(4)


async def test_a_partition_with_too_much_uncommitted_starts_no_more_before_a_commit() -> None:
    running = Harness(
        ScriptedConsumer(blocks=True), max_uncommitted=4, max_poll_records=4, commit_interval_s=0.01
    )
    running.member.commit_gate = gate = asyncio.Event()
    running.consumer.write(A, *values(8))
    async with running.running(A, B):
        await running.until_taken(4)
        running.consumer.write(B, b"other")
        await running.until_taken(5)
        assert running.names[4] == place(B, 0)
        gate.set()
        await running.until_taken(9)
        assert running.member.commits[0][A] <= 4


async def test_a_client_that_comes_starts_beside_another_ones_flood_that_waits() -> None:
    running = Harness(
        ScriptedConsumer(blocks=True),
        answer=False,
        max_started_texts=20,
        max_poll_records=7,
        max_in_flight_jobs=200,
    )
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(100), client=b"flood")
    running.consumer.write(A, b"late", client=b"new")
    async with running.running(A):
        await running.until_taken(11)
        assert [record.value for record in running.taken].count(b"late") == 1
        await wait_until(lambda: running.value("embedq_parked_jobs", lane="interactive") == 90)
        assert running.value("embedq_in_flight_jobs", lane="interactive") == 101
        running.finish(*running.taken[:5])
        await running.until_taken(12)
        assert running.names[11] == place(A, 10)


async def test_what_a_poll_brought_goes_on_before_the_next_poll_is_prepared() -> None:
    class Working(Harness):
        """What is taken begins with a task, as in the service."""

        def take(self, records: Iterable[Record]) -> None:
            self.work = asyncio.create_task(self.look_up(list(records)))

        async def look_up(self, records: Sequence[Record]) -> None:
            self.consumer.calls.append("look up")
            self.taken += records

    running = Working(ScriptedConsumer(blocks=True))
    async with running.running(A):
        await wait_until(lambda: running.consumer.latest == (A,), what="a poll that waits")
        running.consumer.calls.clear()
        running.consumer.write(A, *values(1))
        await running.until_taken(1)
        await wait_until(lambda: "poll" in running.consumer.calls, what="the next poll")
        assert running.consumer.calls[:2] == ["look up", "poll"]


async def test_a_poll_of_many_jobs_is_started_in_several_turns_of_the_event_loop() -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=1000, max_in_flight_jobs=1000)
    running.consumer.write(A, *values(700))
    async with running.running(A):
        await running.until_taken(700)
        assert running.names == [place(A, number) for number in range(700)]


async def test_a_stop_leaves_what_waits_to_the_next_process() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_started_texts=8)
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(50))
    async with running.running(A):
        await running.until_taken(4)
        stopping = asyncio.create_task(running.intake.stop(within=10))
        await _steps()
        running.finish(*running.taken)
        assert await stopping
    assert running.member.stored == {A: 4}
    assert len(running.taken) == 4


async def test_what_waits_of_a_partition_that_moves_is_left_to_its_next_owner() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_started_texts=8)
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(6))
    async with running.running(A, B):
        await running.until_taken(4)
        await wait_until(lambda: running.value("embedq_parked_jobs", lane="interactive") == 2)
        await running.assign(B, release=[A])
        running.finish(*running.taken)
        await wait_until(lambda: "rejoin" in running.member.calls, what="the rejoin")
        assert running.member.stored[A] == 4
        await wait_until(lambda: running.value("embedq_in_flight_jobs", lane="interactive") == 0)
        await running.assign(A, B)
        await running.until_taken(6)
        assert running.names == [place(A, number) for number in range(6)]
        running.finish(*running.taken[4:])
        await wait_until(lambda: running.member.stored[A] == 6, what="the commit")


async def test_what_waits_of_a_release_that_is_taken_back_is_started_after_all() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_started_texts=8)
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(6))
    async with running.running(A):
        await running.until_taken(4)
        await wait_until(lambda: running.value("embedq_parked_jobs", lane="interactive") == 2)
        await running.assign(release=[A])
        running.finish(*running.taken[:3])
        await _steps()
        assert len(running.taken) == 4
        await running.assign(A)
        await running.until_taken(6)
        assert running.names == [place(A, number) for number in range(6)]


async def test_of_a_lost_partition_what_waits_is_dropped() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_started_texts=8)
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(6))
    async with running.running(A):
        await running.until_taken(4)
        await wait_until(lambda: running.value("embedq_parked_jobs", lane="interactive") == 2)
        await running.assign(B)
        running.finish(*running.taken)
        await wait_until(lambda: running.value("embedq_in_flight_jobs", lane="interactive") == 0)
        await _steps()
        assert len(running.taken) == 4


async def test_records_pass_the_gate_and_start_in_their_turn_once_it_is_open() -> None:
    running = Harness(ScriptedConsumer())
    running.gate = gate = _Gate()
    running.consumer.write(A, b"0", None, b"2")
    async with running.running(A):
        await wait_until(lambda: len(gate.came) == 3, what="all of them")
        first, second = [one for one in gate.came if one.value is not None]
        running.intake.park([first])
        await _steps()
        assert (running.taken, running.intake.waits, running.unreadable) == ([], True, [])
        gate.is_open = True
        running.intake.start_more()
        assert running.taken == [first]
        running.intake.finish(second)  # its partition was lost before it passed
        await wait_until(lambda: not running.intake.waits)


class _Gate:
    def __init__(self) -> None:
        self.is_open = False
        self.came: list[Record] = []

    def take(self, records: Sequence[Record]) -> None:
        self.came += records

    def take_unreadable(self, record: Record, why: str) -> None:
        self.came.append(record)


async def test_a_record_holds_back_others_once_half_of_its_partitions_bound_is_started_behind_it() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_uncommitted=8)
    running.consumer.write(A, *values(9))
    async with running.running(A):
        await running.until_taken(5)
        first = running.taken[0]
        assert running.intake.holds_back(first)
        assert not running.intake.holds_back(running.taken[-1])
        running.finish(first)
        await wait_until(lambda: running.member.stored.get(A) == 1, what="the commit")


async def test_interactive_records_are_asked_for_before_bulk_ones_that_are_ready_and_end_no_turn() -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=2)
    running.consumer.write(BULK, *values(4))
    running.consumer.write(OTHER_BULK, *values(4))
    take = running.take

    def one_more_comes(records: Iterable[Record]) -> None:
        if not running.taken:
            running.consumer.write(A, b"urgent")
        take(records)

    running.take = one_more_comes  # type: ignore[method-assign]
    async with running.running(A, BULK, OTHER_BULK):
        await running.until_taken(9)
    assert [record.lane for record in running.taken[:4]] == ["bulk", "bulk", "interactive", "bulk"]
    bulk = [record.ticket.partition for record in running.taken if record.lane == "bulk"]
    assert bulk[0] == bulk[1] != bulk[2] == bulk[3]
    polls = [*zip(running.consumer.polls, running.consumer.timeouts_ms, strict=True)]
    incomplete = [n for n, (asked, _) in enumerate(polls) if len(asked) == 2]
    assert incomplete
    assert all(polls[n - 1] == ((A,), 0) for n in incomplete)
    assert all(timeout == (200 if len(asked) == 3 else 0) for asked, timeout in polls)


async def test_no_partition_gives_a_second_poll_before_the_others_gave_one() -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=5)
    running.consumer.write(A, *values(10))
    running.consumer.write(B, *values(10))
    async with running.running(A, B):
        await running.until_taken(20)
    given_by = [record.ticket.partition for record in running.taken]
    assert len(set(given_by[:5])) == len(set(given_by[5:10])) == 1
    assert given_by[0] != given_by[5]


# -- partitions that come and go --------------------------------------------------------------------------------------------


async def test_a_new_partition_ends_the_poll_under_way_and_is_read_from_its_committed_offset() -> None:
    running = Harness(ScriptedConsumer(blocks=True))
    running.consumer.write(B, *values(3))
    running.member.stored[B] = 2
    async with running.running(A), asyncio.timeout(5):
        await wait_until(lambda: running.consumer.latest == (A,), what="a poll that blocks")
        await running.assign(A, B)
        await running.until_taken(1)
    assert running.names == [place(B, 2)]


async def test_a_partition_that_stays_is_read_on_and_nothing_of_it_comes_twice() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(3))
    async with running.running(A):
        await running.until_taken(3)
        running.finish(running.taken[1])
        for partitions in ((A, B), (A,), (A, B, BULK)):
            await running.assign(*partitions)
            await running.a_turn()
        running.consumer.write(A, b"4")
        await running.until_taken(4)
        running.finish(*running.taken)
        await wait_until(lambda: running.member.stored.get(A) == 4, what="the commit of all")
    assert running.names == [place(A, n) for n in range(4)]


async def test_reading_and_committing_go_on_while_the_group_is_rebalanced() -> None:
    """From our JoinGroup on nothing is heard, until the last member has joined."""
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        running.member.follower.claim()
        running.consumer.write(A, *values(3))
        await wait_until(lambda: running.member.stored.get(A) == 3, what="the commit")


async def test_what_is_committed_between_a_rebalance_and_the_word_of_it_waits_for_the_word() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A, B):
        running.member.next_generation()
        running.consumer.write(A, *values(3))
        await wait_until(
            lambda: (running.value("embedq_commits_total", outcome="fenced") or 0) > 0, what="a fenced commit"
        )
        assert A not in running.member.stored
        running.member.settle(A)
        await wait_until(lambda: running.member.stored.get(A) == 3, what="the commit")
    assert len(running.taken) == 3


async def test_a_partition_on_its_way_to_another_replica_is_drained_and_committed_before_it_is_given_up() -> (
    None
):
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(3))
    async with running.running(A, B):
        await running.until_taken(3)
        await running.assign(B, release=[A])
        running.consumer.write(A, b"for the next owner")
        running.consumer.write(B, b"ours")
        await running.until_taken(4)
        running.finish(*running.taken[:2])
        await wait_until(lambda: running.member.stored.get(A) == 2, what="the commit so far")
        assert "rejoin" not in running.member.calls
        assert decode_claim(running.member.follower.claim()) == Claim(2, {A.topic: [0, 1]})
        running.finish(running.taken[2])
        await wait_until(lambda: "rejoin" in running.member.calls, what="the rejoin")
        assert running.member.stored[A] == 3
        assert running.member.calls[-2:] == ["commit", "rejoin"]
        assert decode_claim(running.member.follower.claim()) == Claim(2, {B.topic: [1]})
        assert running.value("embedq_assigned_partitions") == 1
    assert running.names[3] == place(B, 0)


async def test_a_partition_that_does_not_drain_in_time_is_given_up_and_the_rest_is_its_next_owners() -> None:
    running = Harness(ScriptedConsumer(), answer=False, rebalance_timeout_ms=20)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        with capture_logs() as logs:
            await running.assign(release=[A])
            await wait_until(lambda: "rejoin" in running.member.calls, what="the rejoin")
        assert running.member.stored[A] == 1
        running.finish(running.taken[1])  # too late
        await _rounds(running)
        assert running.member.stored[A] == 1
    assert ("released_undrained", 1) in [(line["event"], line.get("jobs")) for line in logs]


async def test_a_release_whose_commit_fails_is_tried_again() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        await running.assign(release=[A])
        running.member.commit_errors += [KafkaConnectionError(), KafkaConnectionError()]
        running.finish(*running.taken)
        await wait_until(lambda: "rejoin" in running.member.calls, what="the rejoin")
        assert running.member.stored[A] == 1


async def test_a_release_that_is_taken_back_reads_on_where_it_was() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(3))
    async with running.running(A):
        await running.until_taken(3)
        await running.assign(release=[A])
        running.consumer.write(A, b"4")
        await running.assign(A)
        await running.until_taken(4)
        running.finish(*running.taken)
        await wait_until(lambda: running.member.stored.get(A) == 4, what="the commit")
    assert running.names == [place(A, n) for n in range(4)]


async def test_records_that_a_poll_returns_after_their_partition_was_taken_are_read_by_whoever_has_it_then() -> (
    None
):
    """The poll has its records in the same step in which the partition goes; here it comes back to us."""
    running = Harness(ScriptedConsumer(blocks=True))
    async with running.running(A):
        await wait_until(lambda: running.consumer.latest == (A,), what="a poll that blocks")
        running.consumer.write(A, *values(2))
        running.member.assign(release=[A])
        await wait_until(lambda: "rejoin" in running.member.calls, what="the release")
        assert running.taken == []
        await running.assign(A)
        await running.until_taken(2)
        await wait_until(lambda: running.member.stored.get(A) == 2, what="the commit")
    assert running.names == [place(A, 0), place(A, 1)]


async def test_records_that_were_not_taken_are_read_again_after_a_hold_in_which_their_partition_came_back() -> (
    None
):
    running = Harness(ScriptedConsumer(blocks=True), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        await wait_until(lambda: len(running.consumer.polls) == 2, what="a poll that blocks")
        running.consumer.write(A, b"2")
        running.member.assign(release=[A])  # which waits for the first record
        over = asyncio.Event()
        hold = asyncio.create_task(_hold_until(running.intake, over))
        await wait_until(lambda: running.consumer.positions == {A: 2}, what="a poll with records")
        await _steps()
        assert len(running.taken) == 1
        running.member.assign(A)
        running.finish(running.taken[0])
        over.set()
        await hold
        await running.until_taken(2)
    assert running.names == [place(A, 0), place(A, 1)]


async def _hold_until(intake: Intake, over: asyncio.Event) -> None:
    async with intake.held(30):
        await over.wait()


async def test_of_a_lost_partition_nothing_is_committed_and_a_late_answer_changes_nothing() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        await wait_until(lambda: running.member.stored.get(A) == 1, what="the commit")
        await running.assign(B)
        running.finish(running.taken[1])
        await _rounds(running)
        assert running.member.stored[A] == 1
        await running.assign(A)
        await running.until_taken(3)
        running.finish(running.taken[1])  # of the epoch before, again
        await _rounds(running)
        assert running.member.stored[A] == 1
        running.finish(running.taken[2])
        await wait_until(lambda: running.member.stored.get(A) == 2, what="the commit")


async def test_who_is_expelled_reads_nothing_more_and_begins_anew_where_the_others_have_come() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(4))
    running.consumer.blocks = True
    async with running.running(A):
        await running.until_taken(4)
        running.member.expel()
        await running.until_read()
        running.finish(*running.taken)
        await _rounds(running)
        assert running.member.commits == []
        running.member.stored[A] = 3
        await running.assign(A)
        await running.until_taken(5)
    assert running.names[4] == place(A, 3)


async def test_a_start_that_the_coordinator_does_not_tell_is_asked_for_again() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, b"1")
    running.member.open_errors.append(KafkaConnectionError())
    with capture_logs() as logs:
        async with running.running(A):
            await running.until_taken(1)
    assert ("committed_offsets_unknown", "KafkaConnectionError") in [
        (line["event"], line.get("reason")) for line in logs
    ]


async def test_a_start_that_was_asked_for_before_another_rebalance_is_asked_for_anew() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, *values(5))
    running.member.open_gate = gate = asyncio.Event()
    await running.intake.open()
    async with running.running():
        running.member.assign(A)
        await _steps()  # the question is on its way
        running.member.assign()
        running.member.assign(A)
        running.member.stored[A] = 4
        gate.set()
        await running.until_taken(1)
    assert running.names == [place(A, 4)]


async def test_a_membership_that_cannot_go_on_ends_the_commit_loop() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A, fails_with=ZeroDivisionError):
        running.member.failure = ZeroDivisionError()
        running.member.assign(A)
        with pytest.raises(ZeroDivisionError):
            await running.committing


@pytest.mark.parametrize("written_before_the_look", [True, False])
async def test_all_records_of_a_topic_made_anew_are_taken_although_as_many_of_the_old_one_were_in_flight(
    monkeypatch: pytest.MonkeyPatch, written_before_the_look: bool
) -> None:
    """Either the new topic is as long as the old one by the time of the next poll, or it is found empty first."""
    monkeypatch.setattr(topic_watch, "_EVERY_S", 0.0)
    harness = Harness(ScriptedConsumer(), answer=False, max_poll_records=100)
    consumer, member = harness.consumer, harness.member
    consumer.write(A, *[b"old"] * 30)
    consumer.write(B, b"other")
    member.ids = {TOPICS.jobs: "old"}
    async with harness.running(A, B):
        await wait_until(lambda: len(harness.taken) == 31, what="the old jobs")
        old = list(harness.taken)
        consumer.make_anew(A)
        if not written_before_the_look:
            polls = len(consumer.polls)
            await wait_until(lambda: len(consumer.polls) > polls + 1, what="polls of an empty topic")
        consumer.write(A, *[b"new"] * 30)
        member.ids = {TOPICS.jobs: "new"}
        harness.finish(*old)
        harness.answer = True
        await wait_until(
            lambda: sum(record.value == b"new" for record in harness.taken) >= 30, what="the new jobs"
        )
        await wait_until(lambda: member.stored.get(A) == 30, what="their commit")
        assert not harness.polling.done()
        assert not harness.committing.done()
    new = [record.ticket.offset for record in harness.taken if record.value == b"new"]
    assert new == list(range(30)), "each once"


async def test_a_partition_that_begins_below_what_was_taken_is_opened_again_and_the_loop_goes_on() -> None:
    """A broker that knows no ids, or a log that lost its end to an election."""
    harness = Harness(ScriptedConsumer())
    consumer, member = harness.consumer, harness.member
    consumer.write(A, *[b"old"] * 5)
    async with harness.running(A):
        await wait_until(lambda: member.stored.get(A) == 5, what="the commit")
        consumer.make_anew(A)
        with capture_logs() as logs:
            consumer.write(A, b"new", b"new")
            await wait_until(lambda: len(harness.taken) == 7, what="the new jobs")
        assert "partition_went_back" in [line["event"] for line in logs]
        assert not harness.polling.done()


async def test_the_lag_is_what_lies_between_commit_and_end_and_zero_once_the_partition_is_gone() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(3))

    def lag() -> float | None:
        return running.value("embedq_lag_records", topic=A.topic, partition="0")

    async with running.running(A):
        await running.until_taken(3)
        running.finish(running.taken[0])
        await wait_until(lambda: lag() == 2, what="the lag")
        running.finish(*running.taken[1:])
        await wait_until(lambda: lag() == 0, what="no lag")
        running.consumer.write(A, b"not ours")
        await running.assign(B)
        assert lag() == 0


async def _rounds(running: Harness) -> None:
    """Some rounds of the commit loop."""
    for _ in range(3):
        running.intake._committer.hurry()
        await asyncio.sleep(0.005)


# -- retry topics -----------------------------------------------------------------------------------------------------------

TIER = TopicPartition(TOPICS.retry(1), 0)
TIERS = RetryTiers(tiers=(Tier(number=1, topic=TIER.topic, delay_s=60.0),))
PAST = Past(topic=BULK.topic, partition=4, offset=44, timestamp_ms=55, timestamp_type=1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


def with_tiers(**options: Any) -> tuple[Harness, Clock]:
    """An intake that reads a retry topic, too, and a clock for its records."""
    clock = Clock()
    running = Harness(ScriptedConsumer(), retries=TIERS, **options)
    tiered = TierConsumer(running.consumer, TIERS, clock=lambda: clock.now, wall_clock=lambda: clock.now)
    running.intake._consumer = running.intake._reading._consumer = tiered
    return running, clock


async def test_it_asks_for_the_retry_topics_that_there_are() -> None:
    running, _ = with_tiers()
    await running.intake.open()
    assert running.member.topics == [*TOPICS.lanes, TIER.topic]


async def test_a_job_that_is_run_again_is_a_bulk_job_as_it_came_in() -> None:
    running, _ = with_tiers()
    running.consumer.write(TIER, b"value", headers=headers_of([("own", b"1")], PAST, 0))
    async with running.running(TIER):
        await running.until_taken(1)
        [record] = running.taken
        assert (record.name, record.lane, record.ticket.partition) == (f"{BULK.topic}-4-44", "bulk", TIER)
        assert (record.headers, record.timestamp_ms, record.timestamp_type) == ((("own", b"1"),), 55, 1)
        assert record.past == PAST
        await wait_until(lambda: running.member.stored == {TIER: 1}, what="the commit")


async def test_the_same_headers_on_a_lane_mean_nothing() -> None:
    running, _ = with_tiers()
    forged = tuple(headers_of([], PAST, 10**15))
    running.consumer.write(BULK, b"value", headers=forged)
    async with running.running(BULK):
        await running.until_taken(1)
    [record] = running.taken
    assert (record.name, record.past, record.headers) == (place(BULK, 0), None, forged)


async def test_jobs_that_wait_are_lag_and_nothing_else_waits_for_them() -> None:
    running, clock = with_tiers()
    running.consumer.write(TIER, b"a", b"b", headers=headers_of([], PAST, 10**15))
    async with running.running(BULK, TIER):
        running.consumer.write(BULK, *values(20))
        await running.until_taken(20)
        await wait_until(
            lambda: running.value("embedq_lag_records", topic=TIER.topic, partition="0") == 2,
            what="the jobs that wait",
        )
        assert running.value("embedq_in_flight_jobs", lane="bulk") == 0
        clock.now = 60.0
        await running.until_taken(22)
        await wait_until(lambda: running.member.stored.get(TIER) == 2, what="the commit")


async def test_a_stop_and_a_move_leave_what_waits_to_the_next_owner() -> None:
    running, clock = with_tiers()
    running.consumer.write(TIER, b"a", b"b", headers=headers_of([], PAST, 10**15))
    async with running.running(BULK, TIER):
        await wait_until(lambda: list(running.consumer.latest) == [BULK], what="a poll without the tier")
        await running.assign(BULK, release=[TIER])
        clock.now = 60.0
        await running.a_turn()
        assert running.taken == []
        assert running.member.stored.get(TIER, 0) == 0
        await running.assign(BULK, TIER)
        clock.now = 120.0
        await running.until_taken(2)
        assert [record.ticket.offset for record in running.taken] == [0, 1]


# -- watermarks -------------------------------------------------------------------------------------------------------------


async def test_a_record_that_later_ones_overtake_for_too_long_is_a_trouble_and_then_given_up() -> None:
    running = Harness(ScriptedConsumer(), answer=False, stuck_after_s=0.02, stuck_limit_s=0.05)
    running.consumer.write(A, b"stuck")
    told: list[str | None] = []
    given_up: list[Record] = []

    def give_up(record: Record, overtaken: Overtaken) -> None:
        assert (overtaken.partition, overtaken.offset) == (A, 0)
        given_up.append(record)

    async with running.running(A, B):
        watching = asyncio.create_task(running.intake.watch(give_up, told.append))
        await running.until_taken(1)
        running.consumer.write(B, b"passes")
        await running.until_taken(2)
        running.finish(running.taken[1])
        await wait_until(lambda: bool(given_up), what="the record that is given up")
        assert given_up == running.taken[:1]
        reason = next(reason for reason in told if reason)
        assert reason.startswith(f"{A.topic}-0 is stuck at offset 0: later jobs have been answered for ")
        assert (running.value("embedq_overtaken_seconds") or 0) >= 0.05
        running.finish(given_up[0])  # its error was published
        await wait_until(lambda: running.member.stored.get(A) == 1, what="the commit past it")
        running.finish(running.taken[0])  # and the late result of the job itself
        await wait_until(lambda: told[-1] is None, what="the end of the trouble")
        assert len(given_up) == 1
        assert running.value("embedq_overtaken_seconds") == 0
        watching.cancel()


# -- reading ahead ------------------------------------------------------------------------------------------------------------


async def test_no_more_is_started_than_is_answered_in_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is alone has half of it."""
    monkeypatch.setattr(workload, "_LEAST_READ_AHEAD", 6)
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(9))
    async with running.running(A):
        await running.until_taken(3)
        await _steps()
        assert len(running.taken) == 3


# -- holds ----------------------------------------------------------------------------------------------------------------


async def test_inside_a_hold_nothing_is_in_flight_and_nothing_is_polled() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def hold() -> None:
            async with running.intake.held(5):
                inside.set()
                await leave.wait()

        holding = asyncio.create_task(hold())
        await _steps()
        assert not inside.is_set()
        running.finish(*running.taken)
        await inside.wait()
        polls, beats = len(running.consumer.polls), running.beats
        running.consumer.write(A, b"3")
        await wait_until(lambda: running.beats > beats, what="a turn of the loop")
        assert len(running.consumer.polls) == polls
        assert len(running.taken) == 2
        leave.set()
        await holding
        await running.until_taken(3)


async def test_before_a_hold_what_is_started_runs_down_and_polls_go_on_meanwhile() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(20))
    async with running.running(A):
        await running.until_taken(20)
        entering = asyncio.create_task(_enter(running))
        polls = len(running.consumer.polls)
        await wait_until(
            lambda: len(running.consumer.polls) > polls + 2, what="polls, while many are started"
        )
        running.finish(*running.taken[:4])
        await running.a_turn()
        polls = len(running.consumer.polls)
        running.consumer.write(A, b"more")
        await running.a_turn()
        assert len(running.consumer.polls) == polls
        assert not entering.done()
        running.finish(*running.taken[4:])
        assert len(await entering) == 20
        await running.until_taken(21)


async def test_the_records_of_a_poll_that_was_under_way_wait_until_the_hold_is_over() -> None:
    """The poll has its records in the same step in which it is interrupted, and they are not lost."""
    running = Harness(ScriptedConsumer(blocks=True), answer=False)
    async with running.running(A):
        await wait_until(lambda: running.consumer.latest == (A,), what="a poll that blocks")
        entering = asyncio.create_task(_enter(running))
        running.consumer.write(A, b"1")
        assert await entering == []
        await running.until_taken(1)


async def _enter(running: Harness) -> list[str]:
    """Which records were started when a hold was over."""
    async with running.intake.held(5):
        return list(running.names)


async def test_a_hold_that_is_not_reached_in_time_holds_nothing() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        with pytest.raises(TimeoutError):
            async with running.intake.held(0.01):
                raise AssertionError("reached")
        running.consumer.write(A, b"2")
        await running.until_taken(2)


async def test_a_second_hold_goes_on_when_the_first_is_over() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        async with running.intake.held(5):
            async with running.intake.held(5):
                pass
            running.consumer.write(A, b"1")
            beats = running.beats
            await wait_until(lambda: running.beats > beats, what="a turn of the loop")
            assert running.taken == []
        await running.until_taken(1)


# -- the end ----------------------------------------------------------------------------------------------------------------


async def test_a_stop_takes_nothing_more_waits_for_what_is_in_flight_and_commits_it() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        stopping = asyncio.create_task(running.intake.stop(within=5))
        await running.polling
        running.consumer.write(A, b"too late")
        running.finish(*running.taken)
        assert await stopping
        assert running.member.commits == [{A: 2}]
        assert len(running.taken) == 2


async def test_a_stop_that_runs_out_of_time_commits_what_was_finished() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        assert await running.intake.stop(within=0.01) is False
        assert running.member.commits == [{A: 1}]


async def test_a_stop_commits_and_leaves_in_the_middle_of_a_rebalance() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        running.member.follower.claim()
        running.finish(*running.taken)
        assert await running.intake.stop(within=5)
        assert running.member.stored == {A: 1}
        assert running.member.calls[-1] == "close"


async def test_a_stop_between_a_rebalance_and_the_word_of_it_sends_its_last_commit_again() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        running.member.next_generation()
        running.finish(*running.taken)
        stopping = asyncio.create_task(running.intake.stop(within=5))
        await wait_until(
            lambda: (running.value("embedq_commits_total", outcome="fenced") or 0) > 1, what="fenced commits"
        )
        running.member.settle(A)
        assert await stopping
        assert running.member.stored == {A: 1}


async def test_after_a_stop_nothing_is_committed_any_more_and_the_commit_loop_goes_on() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        assert await running.intake.stop(within=0.01) is False
        running.finish(running.taken[1])
        await _rounds(running)
        assert running.member.stored == {A: 1}
        assert not running.committing.done()


async def test_a_last_commit_that_nobody_takes_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offset_committer, "_LAST_COMMIT_S", 0.01)
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        running.member.next_generation()
        running.finish(*running.taken)
        with capture_logs() as logs:
            assert await running.intake.stop(within=5)
    assert "last_commit_failed" in {line["event"] for line in logs}


async def test_leaving_the_group_is_bounded_and_a_failure_is_no_more_than_a_warning() -> None:
    running = Harness(ScriptedConsumer())
    await running.intake.close()
    running.member.problem = "TimeoutError"
    running.consumer.stop_error = KafkaConnectionError()
    with capture_logs() as logs:
        await running.intake.close()
    assert running.consumer.calls == ["stop", "stop"]
    assert running.member.calls == ["close", "close"]
    assert [(line["event"], line["reason"]) for line in logs] == [("group_left_by_timeout", "TimeoutError")]


# -- offsets that are no records --------------------------------------------------------------------------------------------


async def test_markers_and_holes_after_the_last_record_are_committed_too() -> None:
    running = Harness(ScriptedConsumer(), commit_interval_s=0.001)
    running.consumer.write(A, b"1")
    running.consumer.write_gap(A, 3)
    async with running.running(A):
        await wait_until(lambda: running.member.stored.get(A) == 4, what="the commit past the gap")


async def test_a_gap_is_not_stepped_over_before_the_records_ahead_of_it_are_finished() -> None:
    running = Harness(ScriptedConsumer(), answer=False, commit_interval_s=0.001)
    running.consumer.write(A, b"1")
    running.consumer.write_gap(A, 3)
    async with running.running(A):
        await running.until_taken(1)
        await running.a_turn()
        await wait_until(lambda: running.member.stored.get(A) == 0, what="a commit before the record")
        running.finish(*running.taken)
        await wait_until(lambda: running.member.stored.get(A) == 4, what="the commit past the gap")


# -- records that cannot be read --------------------------------------------------------------------------------------------


async def test_a_record_that_cannot_be_read_is_stepped_over_and_costs_no_other_one() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, *values(3))
    running.consumer.write(B, b"1", b"2", None, b"3")
    async with running.running(A, B):
        await running.until_taken(6)
    assert running.unreadable == [(place(B, 2), "why")]
    assert sorted(running.names) == sorted(
        [*(place(A, n) for n in range(3)), place(B, 0), place(B, 1), place(B, 3)]
    )


async def test_an_unreadable_record_is_in_flight_until_it_is_answered() -> None:
    running = Harness(ScriptedConsumer())
    stuck: list[Record] = []
    running.step_over = lambda record, why: stuck.append(record)  # type: ignore[method-assign]
    running.consumer.write(A, None)
    async with running.running(A):
        await wait_until(lambda: bool(stuck), what="the unreadable record")
        [record] = stuck
        assert (record.key, record.value, record.headers, record.timestamp_ms) == (None, None, (), -1)
        with pytest.raises(TimeoutError):
            async with running.intake.held(0.01):
                pass
        running.finish(record)
        assert await running.intake.stop(within=5)
        assert running.member.commits == [{A: 1}]


async def test_of_a_batch_that_cannot_be_read_its_last_record_is_in_flight_and_the_others_are_passed() -> (
    None
):
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, b"1")
    running.consumer.write_gap(A, 9)
    running.consumer.write(A, None, b"2")
    async with running.running(A):
        await running.until_taken(2)
        assert await running.intake.stop(within=5)
    assert running.unreadable == [(place(A, 10), "why")]
    assert running.member.stored == {A: 12}


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.sampled_from([b"good", None]), max_size=6),
        min_size=3,
        max_size=3,
    ),
    st.integers(1, 5),
)
async def test_wherever_unreadable_records_are_each_record_comes_once_and_in_order(
    logs: list[list[bytes | None]], limit: int
) -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=limit)
    partitions = (A, B, BULK)
    good: set[str] = set()
    bad: set[str] = set()
    for partition, log in zip(partitions, logs, strict=True):
        running.consumer.write(partition, *log)
        for offset, value in enumerate(log):
            (bad if value is None else good).add(place(partition, offset))
    async with running.running(*partitions):
        await wait_until(
            lambda: len(running.taken) >= len(good) and len(running.unreadable) >= len(bad), what="all"
        )
        assert await running.intake.stop(within=5)
    assert (len(running.taken), set(running.names)) == (len(good), good)
    assert (len(running.unreadable), {name for name, _ in running.unreadable}) == (len(bad), bad)
    for partition in partitions:
        offsets = [r.ticket.offset for r in running.taken if r.ticket.partition == partition]
        assert offsets == sorted(offsets)
    stored = {p: running.member.stored[p] for p, log in zip(partitions, logs, strict=True) if log}
    assert stored == {p: len(log) for p, log in zip(partitions, logs, strict=True) if log}
