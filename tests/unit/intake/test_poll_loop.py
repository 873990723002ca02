"""The intake without a broker: every habit of the client that its comments name, and what the loop makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedq_consumer.fairness import Cost
from embedq_consumer.intake import poll_loop
from embedq_consumer.intake.jobs_consumer import IntakeOptions
from embedq_consumer.intake.poll_loop import NOWHERE, Intake
from embedq_consumer.intake.records import Record
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Topics
from tests.helpers.scripted_consumer import ScriptedConsumer
from tests.helpers.support import wait_until

TOPICS = Topics("t")
A, B = TopicPartition(TOPICS.jobs, 0), TopicPartition(TOPICS.jobs, 1)
BULK, OTHER_BULK = TopicPartition(TOPICS.bulk, 0), TopicPartition(TOPICS.bulk, 1)


class Harness:
    """An intake over a scripted consumer. What it takes is answered at once, or when the test says so."""

    def __init__(self, consumer: ScriptedConsumer, *, answer: bool = True, **options: Any) -> None:
        self.consumer = consumer
        self.answer = answer
        self.cost: Cost | None = None
        """What each job turns out to take."""
        self.taken: list[Record] = []
        self.unreadable: list[tuple[str, str]] = []
        self.beats = 0
        self.metrics = Metrics()
        defaults: dict[str, Any] = {
            "group": "g",
            "max_in_flight_jobs": 100,
            "max_in_flight_bytes": 10_000_000,
            "max_started_texts": 10_000,
            "max_pending_bytes": 1_000_000_000,
            "max_poll_records": 10,
            "max_uncommitted": 1000,
            "commit_interval_s": 60.0,
            "session_timeout_ms": 6000,
            "rebalance_timeout_ms": 60_000,
        }
        self.intake = Intake(
            consumer,
            IntakeOptions(**defaults | options),
            topics=TOPICS,
            metrics=self.metrics,
            beat=self._beat,
        )
        self.polling: asyncio.Task[None]

    @asynccontextmanager
    async def running(
        self, *partitions: TopicPartition, fails_with: type[Exception] | None = None
    ) -> AsyncIterator[None]:
        """The loop runs, as a member that was given these partitions. `fails_with`: it ends itself, by this error."""
        await self.intake.open()
        self.polling = asyncio.create_task(self.intake.run(self.take, self.step_over))
        committing = asyncio.create_task(self.intake.commit_forever())
        try:
            await self.consumer.rebalance(*partitions)
            yield
        finally:
            for task in (self.polling, committing):
                task.cancel()
                with suppress(asyncio.CancelledError, *([fails_with] if fails_with else [])):
                    await task

    def _beat(self) -> None:
        self.beats += 1

    def take(self, records: Iterable[Record]) -> None:
        for record in records:
            self.taken.append(record)
            if self.cost is not None:
                self.intake.weigh(record, self.cost)
            if self.answer:
                self.finish(record)

    def step_over(self, record: Record, error: Exception) -> None:
        self.unreadable.append((record.name, type(error).__name__))
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
        polls = len(self.consumer.polls)
        await wait_until(lambda: len(self.consumer.polls) >= polls + 2, what="two polls")

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


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
    assert list(running.consumer.subscribed) == list(TOPICS.lanes)


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
        await running.consumer.rebalance(A)
        assert running.value("embedq_assigned_partitions") == 1
        assert running.value("embedq_rebalances_total") == 2


async def test_every_turn_is_a_heartbeat_while_there_is_nothing_to_read() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        beats = running.beats
        await wait_until(lambda: running.beats > beats + 2, what="heartbeats")


# -- which partitions are polled ------------------------------------------------------------------------------------------


async def test_a_replica_without_partitions_polls_nowhere_so_that_the_group_hears_of_it() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running():
        await running.a_turn()
        assert set(running.consumer.polls) == {(NOWHERE,)}


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


async def test_with_every_lane_full_the_poll_waits_nowhere() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False, max_in_flight_jobs=1)
    running.consumer.write(A, *values(2))
    running.consumer.write(BULK, *values(2))
    async with running.running(A, BULK):
        await running.until_taken(2)
        await wait_until(lambda: running.consumer.latest == (NOWHERE,), what="a poll of nowhere")
        assert running.consumer.limits[-1] == 1
        running.finish(*running.taken)
        await running.until_taken(4)


async def test_a_partition_with_too_much_uncommitted_starts_no_more_before_a_commit() -> None:
    running = Harness(
        ScriptedConsumer(blocks=True), max_uncommitted=4, max_poll_records=4, commit_interval_s=0.01
    )
    running.consumer.commit_gate = gate = asyncio.Event()
    running.consumer.write(A, *values(8))
    async with running.running(A, B):
        await running.until_taken(4)
        running.consumer.write(B, b"other")
        await running.until_taken(5)
        assert running.names[4] == place(B, 0)
        gate.set()
        await running.until_taken(9)
        assert running.consumer.commits[0][A] == 4


async def test_a_client_that_comes_starts_beside_another_ones_flood_that_waits() -> None:
    running = Harness(ScriptedConsumer(blocks=True), answer=False, max_started_texts=20, max_poll_records=7)
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


async def test_a_poll_of_many_jobs_is_started_in_several_turns_of_the_event_loop() -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=1000)
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
        await wait_until(lambda: running.consumer.polls != [], what="a poll")
        running.finish(*running.taken)
        assert await stopping
    assert running.consumer.stored == {A: 4}
    assert len(running.taken) == 4


async def test_a_rebalance_forgets_what_waits_and_reads_it_again() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_started_texts=8)
    running.cost = Cost(1, 1000)
    running.consumer.write(A, *values(6))
    async with running.running(A):
        await running.until_taken(4)
        rebalance = asyncio.create_task(running.consumer.rebalance(A))
        await asyncio.sleep(0)
        running.finish(*running.taken)
        await rebalance
        await running.until_taken(6)
        assert running.names == [place(A, number) for number in range(6)]
        running.finish(*running.taken[4:])
        await running.a_turn()
        assert running.value("embedq_in_flight_jobs", lane="interactive") == 0


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
    assert all(timeout == (200 if len(asked) == 3 else 0) for asked, timeout in polls if NOWHERE not in asked)


async def test_no_partition_gives_a_second_poll_before_the_others_gave_one() -> None:
    running = Harness(ScriptedConsumer(), max_poll_records=5)
    running.consumer.write(A, *values(10))
    running.consumer.write(B, *values(10))
    async with running.running(A, B):
        await running.until_taken(20)
    given_by = [record.ticket.partition for record in running.taken]
    assert len(set(given_by[:5])) == len(set(given_by[5:10])) == 1
    assert given_by[0] != given_by[5]


# -- rebalances -----------------------------------------------------------------------------------------------------------


async def test_a_rebalance_ends_a_poll_that_would_wait_for_it() -> None:
    running = Harness(ScriptedConsumer(blocks=True))
    async with running.running(A), asyncio.timeout(5):
        await wait_until(lambda: running.consumer.latest == (A,), what="a poll that blocks")
        await running.consumer.rebalance(B)
        running.consumer.write(B, b"1")
        await running.until_taken(1)


async def test_partitions_are_given_up_only_after_what_is_in_flight_was_finished_and_committed() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(3))
    async with running.running(A):
        await running.until_taken(3)
        running.consumer.calls.clear()
        revoking = asyncio.create_task(running.consumer.revoke())
        running.finish(running.taken[0])
        await _steps()
        assert not revoking.done()
        running.finish(*running.taken[1:])
        await revoking
        assert running.consumer.calls[-2:] == ["commit", "given_up"]
        assert running.consumer.commits == [{A: 3}]
        await running.consumer.assign(A)
        await running.a_turn()
        assert len(running.taken) == 3


async def test_no_poll_runs_between_a_revocation_and_the_next_assignment() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        await running.consumer.revoke()
        running.consumer.calls.clear()
        running.consumer.write(A, b"1")
        await _steps()
        assert running.consumer.calls == []
        await running.consumer.assign(A)
        await running.until_taken(1)


async def test_what_a_revocation_cannot_wait_for_is_not_committed_and_a_late_answer_changes_nothing() -> None:
    running = Harness(ScriptedConsumer(), answer=False, rebalance_timeout_ms=20)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        await running.consumer.revoke()
        assert running.consumer.commits == [{A: 1}]
        await running.consumer.assign(A)
        await running.until_taken(3)  # the second one again, for its next owner
        running.finish(running.taken[1])  # of the epoch before
        await running.consumer.revoke()
        assert running.consumer.commits[1:] == [{A: 1}]  # where the epoch's only record is still open


async def test_the_first_join_revokes_nothing_and_commits_nothing() -> None:
    running = Harness(ScriptedConsumer())
    async with running.running(A):
        assert running.consumer.commits == []


async def test_a_revocation_that_fails_ends_the_loop_although_the_client_would_go_on() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, b"1")
    async with running.running(A, fails_with=ZeroDivisionError):
        await running.until_taken(1)
        running.consumer.commit_errors.append(ZeroDivisionError())
        await running.consumer.rebalance(A)
        with pytest.raises(ZeroDivisionError):
            await running.polling


async def test_the_lag_of_a_partition_that_was_lost_is_zero_here() -> None:
    running = Harness(ScriptedConsumer(), commit_interval_s=0.001, answer=False)
    running.consumer.write(A, *values(3))

    def lag() -> float | None:
        return running.value("embedq_lag_records", topic=A.topic, partition="0")

    async with running.running(A):
        await running.until_taken(3)
        running.finish(running.taken[0])
        await wait_until(lambda: lag() == 2, what="the lag")
        running.finish(*running.taken[1:])
        await running.consumer.revoke()
        running.consumer.write(A, b"not ours")
        await running.consumer.assign(B)
        assert lag() == 0


# -- holds ----------------------------------------------------------------------------------------------------------------


async def test_inside_a_hold_nothing_is_in_flight_and_the_group_still_hears_of_us() -> None:
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
        await wait_until(lambda: running.consumer.latest == (NOWHERE,), what="a poll of nowhere")
        assert not inside.is_set()
        running.finish(*running.taken)
        await inside.wait()
        running.consumer.write(A, b"3")
        await _steps()  # a poll of nowhere is under way again, and blocks
        assert running.consumer.latest == (NOWHERE,)
        assert len(running.taken) == 2
        leave.set()
        await holding
        await running.until_taken(3)


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
            await running.a_turn()
            assert running.consumer.latest == (NOWHERE,)
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
        assert running.consumer.commits == [{A: 2}]
        assert len(running.taken) == 2


async def test_a_stop_that_runs_out_of_time_commits_what_was_finished() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, *values(2))
    async with running.running(A):
        await running.until_taken(2)
        running.finish(running.taken[0])
        assert await running.intake.stop(within=0.01) is False
        assert running.consumer.commits == [{A: 1}]


async def test_a_stop_does_not_wait_for_the_end_of_a_rebalance_nor_commits_in_it() -> None:
    running = Harness(ScriptedConsumer(), answer=False, rebalance_timeout_ms=2)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        await running.consumer.revoke()  # its record was not finished in time
        commits = len(running.consumer.commits)
        running.finish(*running.taken)
        assert await running.intake.stop(within=5)
        await running.polling
        assert len(running.consumer.commits) == commits


async def test_a_stop_during_a_revocation_still_commits() -> None:
    running = Harness(ScriptedConsumer(), answer=False)
    running.consumer.write(A, b"1")
    async with running.running(A):
        await running.until_taken(1)
        revoking = asyncio.create_task(running.consumer.revoke())
        await asyncio.sleep(0)
        stopping = asyncio.create_task(running.intake.stop(within=5))
        running.finish(*running.taken)
        assert await stopping
        await revoking
        assert running.consumer.commits == [{A: 1}]


async def test_leaving_the_group_is_bounded_and_a_failure_is_no_more_than_a_warning() -> None:
    running = Harness(ScriptedConsumer())
    await running.intake.close()
    running.consumer.stop_error = KafkaConnectionError()
    with capture_logs() as logs:
        await running.intake.close()
    assert running.consumer.calls == ["stop", "stop"]
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("group_left_by_timeout", "KafkaConnectionError")
    ]


# -- offsets that are no records --------------------------------------------------------------------------------------------


async def test_markers_and_holes_after_the_last_record_are_committed_too() -> None:
    running = Harness(ScriptedConsumer(), commit_interval_s=0.001)
    running.consumer.write(A, b"1")
    running.consumer.write_gap(A, 3)
    async with running.running(A):
        await wait_until(lambda: running.consumer.stored.get(A) == 4, what="the commit past the gap")


async def test_a_gap_is_not_stepped_over_before_the_records_ahead_of_it_are_finished() -> None:
    running = Harness(ScriptedConsumer(), answer=False, commit_interval_s=0.001)
    running.consumer.write(A, b"1")
    running.consumer.write_gap(A, 3)
    async with running.running(A):
        await running.until_taken(1)
        await running.a_turn()
        await wait_until(lambda: running.consumer.stored.get(A) == 0, what="a commit before the record")
        running.finish(*running.taken)
        await wait_until(lambda: running.consumer.stored.get(A) == 4, what="the commit past the gap")


# -- records that cannot be read --------------------------------------------------------------------------------------------


async def test_a_record_that_cannot_be_read_is_stepped_over_and_costs_no_other_one() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, *values(3))
    running.consumer.write(B, b"1", b"2", None, b"3")
    with capture_logs() as logs:
        async with running.running(A, B):
            await running.until_taken(6)
    assert running.unreadable == [(place(B, 2), "UnicodeDecodeError")]
    assert sorted(running.names) == sorted(
        [*(place(A, n) for n in range(3)), place(B, 0), place(B, 1), place(B, 3)]
    )
    assert "poll_failed" in {line["event"] for line in logs}


async def test_an_unreadable_record_is_in_flight_until_it_is_answered() -> None:
    running = Harness(ScriptedConsumer())
    stuck: list[Record] = []
    running.step_over = lambda record, error: stuck.append(record)  # type: ignore[method-assign]
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
        assert running.consumer.commits == [{A: 1}]


async def test_reading_carefully_stops_at_a_full_lane() -> None:
    running = Harness(ScriptedConsumer(), answer=False, max_in_flight_jobs=3)
    running.consumer.write(A, b"1", b"2")
    async with running.running(A):
        await running.until_taken(2)
        running.consumer.write(A, b"3", None)
        await running.until_taken(3)
        await running.a_turn()
        assert running.unreadable == []
        running.finish(*running.taken)
        await wait_until(lambda: bool(running.unreadable), what="the unreadable record")


async def test_reading_carefully_ends_with_a_stop() -> None:
    running = Harness(ScriptedConsumer())
    running.consumer.write(A, *values(8), None)
    stopping: list[asyncio.Task[bool]] = []
    take = running.take

    def stop_at_the_first(records: Iterable[Record]) -> None:
        take(records)
        if not stopping:
            stopping.append(asyncio.create_task(running.intake.stop(within=5)))

    running.take = stop_at_the_first  # type: ignore[method-assign]
    async with running.running(A):
        await running.polling
        assert await stopping[0]
        assert len(running.taken) < 8
        assert running.consumer.commits == [{A: len(running.taken)}]


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
    stored = {p: running.consumer.stored[p] for p, log in zip(partitions, logs, strict=True) if log}
    assert stored == {p: len(log) for p, log in zip(partitions, logs, strict=True) if log}


def test_the_dummy_partition_is_of_no_topic() -> None:
    assert poll_loop.NOWHERE.topic not in TOPICS.lanes
