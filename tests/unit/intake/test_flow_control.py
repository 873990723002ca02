"""How much may be in flight, and which partitions the next poll asks for how many records."""

from __future__ import annotations

from random import Random

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.group import OffsetLedger, Ticket
from embedq_consumer.intake.flow_control import (
    InFlightLimits,
    PartitionRotation,
    PollPlan,
    PollPlanner,
    ReadAhead,
)
from embedq_shared.topics import LANES, Lane

A, B, C = (TopicPartition("jobs", number) for number in range(3))
BULK = TopicPartition("jobs.bulk", 0)

# -- limits -------------------------------------------------------------------------------------------------------------


def flow(max_jobs: int = 4, max_bytes: int = 1000) -> InFlightLimits:
    return InFlightLimits(max_jobs=max_jobs, max_bytes=max_bytes)


def test_a_lane_is_full_once_it_holds_as_many_jobs_as_allowed() -> None:
    bounded = flow(max_jobs=2)
    bounded.add("bulk", 1)
    assert not bounded.is_full("bulk")
    bounded.add("bulk", 1)
    assert bounded.is_full("bulk")
    assert not bounded.is_full("interactive")


def test_a_lane_is_full_once_it_holds_as_many_bytes_as_allowed() -> None:
    bounded = flow(max_bytes=100)
    bounded.add("interactive", 100)
    assert bounded.is_full("interactive")


def test_a_full_lane_takes_records_again_when_half_of_it_is_left() -> None:
    bounded = flow(max_jobs=4)
    for _ in range(4):
        bounded.add("bulk", 1)
    assert bounded.remove("bulk", 1) is False
    assert bounded.is_full("bulk")
    assert bounded.remove("bulk", 1) is True
    assert not bounded.is_full("bulk")


def test_a_large_lane_takes_records_again_after_two_polls_worth_of_answers() -> None:
    bounded = flow(max_jobs=10_000, max_bytes=1_000_000)
    for _ in range(10_000):
        bounded.add("bulk", 1)
    assert [bounded.remove("bulk", 1) for _ in range(1024)] == [False] * 1023 + [True]


def test_only_the_removal_that_opens_the_lane_says_so() -> None:
    bounded = flow(max_jobs=2)
    bounded.add("bulk", 1)
    assert bounded.remove("bulk", 1) is False


def test_headroom_is_that_of_the_emptiest_lane_that_still_takes_jobs() -> None:
    bounded = flow(max_jobs=4)
    assert bounded.headroom() == 4
    bounded.add("interactive", 1)
    for _ in range(4):
        bounded.add("bulk", 1)
    assert bounded.headroom() == 3
    for _ in range(3):
        bounded.add("interactive", 1)
    assert bounded.headroom() == 0


def test_removing_more_than_was_added_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="bug"):
        flow().remove("bulk", 1)


@given(st.lists(st.tuples(st.sampled_from(LANES), st.integers(0, 400)), max_size=40), st.randoms())
def test_with_nothing_in_flight_all_counts_are_zero_and_no_lane_is_full(
    jobs: list[tuple[Lane, int]], random: Random
) -> None:
    bounded = flow()
    for lane, size in jobs:
        bounded.add(lane, size)
    for lane in LANES:
        assert bounded.jobs(lane) == sum(where == lane for where, _ in jobs)
        assert bounded.bytes(lane) == sum(size for where, size in jobs if where == lane)
    random.shuffle(jobs)
    for lane, size in jobs:
        bounded.remove(lane, size)
    assert not any(bounded.is_full(lane) or bounded.jobs(lane) or bounded.bytes(lane) for lane in LANES)


# -- whose turn it is ---------------------------------------------------------------------------------------------------


def test_all_partitions_are_polled_while_polls_are_not_filled() -> None:
    turns = PartitionRotation()
    assert turns.next([A, B]) == [A, B]
    turns.note({A: "123"}, limit=4)
    assert turns.next([A, B]) == [A, B]


def test_a_partition_that_filled_a_poll_waits_until_the_others_had_their_turn() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [B, C]
    turns.note({B: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [C]
    turns.note({C: "1234"}, limit=4)
    assert turns.next([A, B, C]) == [A, B, C]


def test_a_partition_that_filled_a_poll_has_another_turn_once_the_others_have_nothing() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A, B]) == [B]
    turns.note({}, limit=4)
    assert turns.next([A, B]) == [A, B]


def test_a_poll_of_some_of_them_that_was_not_filled_ends_no_turn() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    turns.note({B: "1"}, limit=4, drained=False)
    assert turns.next([A, B, C]) == [B, C]


def test_no_partition_waits_for_one_that_may_not_be_polled() -> None:
    turns = PartitionRotation()
    turns.note({A: "1234"}, limit=4)
    assert turns.next([A]) == [A]
    assert turns.next([]) == []


@given(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.integers(1, 9))
def test_partitions_with_backlogs_stay_within_a_poll_of_each_other(backlogs: list[int], limit: int) -> None:
    left = dict(zip((A, B, C), backlogs, strict=True))
    given_to = dict.fromkeys(left, 0)
    turns = PartitionRotation()
    while any(left.values()):
        polled: dict[TopicPartition, list[None]] = {}
        left_of_limit = limit
        for partition in turns.next(list(left)):  # as the client does: all of the first, then the next
            if count := min(left_of_limit, left[partition]):
                polled[partition] = [None] * count
                left[partition] -= count
                given_to[partition] += count
                left_of_limit -= count
        turns.note(polled, limit)
        waiting = [given_to[partition] for partition in left if left[partition]]
        assert not waiting or max(given_to.values()) - min(waiting) <= 2 * limit


# -- reading ahead --------------------------------------------------------------------------------------------------------


def answer(ahead: ReadAhead, rate: float, seconds: float, start: float = 0.0) -> float:
    """Jobs answered at this rate; the time at the end."""
    count = round(rate * seconds)
    for number in range(count + 1):
        ahead.note_answered(start + number / rate)
    return start + count / rate


def test_as_many_jobs_are_read_ahead_as_are_answered_in_the_time_given() -> None:
    ahead = ReadAhead(2.0, least=10, most=10_000)
    answer(ahead, rate=300, seconds=3)
    assert 590 <= ahead.jobs <= 620


def test_there_is_a_least_number_at_the_start_and_for_the_slowest_and_a_greatest_for_the_fastest() -> None:
    ahead = ReadAhead(2.0, least=64, most=2048)
    assert ahead.jobs == 64
    now = answer(ahead, rate=3, seconds=5)
    assert ahead.jobs == 64
    answer(ahead, rate=5000, seconds=1, start=now)
    assert ahead.jobs == 2048
    assert ReadAhead(2.0, least=64, most=8).jobs == 8


def test_the_best_of_late_counts_and_not_a_lull() -> None:
    ahead = ReadAhead(2.0, least=10, most=10_000)
    now = answer(ahead, rate=300, seconds=3)
    now = answer(ahead, rate=20, seconds=4, start=now)
    assert ahead.jobs >= 590
    answer(ahead, rate=20, seconds=12, start=now)
    assert ahead.jobs < 60


def test_in_a_shorter_time_fewer_are_answered_at_the_same_rate() -> None:
    ahead = ReadAhead(2.0, least=256, most=10_000)
    assert ahead.answered_in(0.5, least=16) == 16
    now = answer(ahead, rate=300, seconds=3)
    assert 145 <= ahead.answered_in(0.5, least=16) <= 155
    answer(ahead, rate=100, seconds=3, start=now)
    assert 90 <= ahead.answered_in(0.5, least=16) <= 110, "the best time counts no more than the others"
    assert ReadAhead(2.0, least=8, most=8).answered_in(0.5, least=16) == 8


def test_it_says_when_the_number_may_have_changed() -> None:
    ahead = ReadAhead(1.0, least=1, most=100)
    assert [ahead.note_answered(now) for now in (0.0, 0.1, 0.5, 0.6)] == [False, False, True, False]


# -- the plan of a poll -------------------------------------------------------------------------------------------------


class Planning:
    """A planner with the ledger and the limits that it reads."""

    def __init__(
        self,
        *partitions: TopicPartition,
        max_jobs: int = 100,
        max_poll_records: int = 10,
    ) -> None:
        self.ledger = OffsetLedger()
        for partition in partitions:
            self.ledger.add(partition, None)
        self.limits = InFlightLimits(max_jobs=max_jobs, max_bytes=1_000_000)
        self.lane_of: dict[str, Lane] = {"jobs": "interactive", "jobs.bulk": "bulk"}
        self.planner = PollPlanner(
            self.limits,
            self.lane_of,
            max_poll_records=max_poll_records,
        )

    def take(self, partition: TopicPartition, count: int) -> list[Ticket]:
        """Records of this partition are in flight."""
        first = self.ledger.position(partition) or 0
        for _ in range(count):
            self.limits.add(self.lane_of[partition.topic], 1)
        return [self.ledger.begin(partition, first + number) for number in range(count)]

    def plan(self) -> PollPlan:
        return self.planner.plan(self.ledger.partitions)

    def due(self) -> set[TopicPartition]:
        return set(self.plan().partitions)


def test_a_poll_of_all_partitions_may_wait() -> None:
    plan = Planning(A, BULK).plan()
    assert (set(plan.partitions), plan.urgent, plan.complete) == ({A, BULK}, [], True)


def test_a_partition_that_may_not_give_records_is_not_asked() -> None:
    assert Planning(A, B).planner.plan([B]).partitions == [B]
    plan = Planning(A).planner.plan([])
    assert (plan.partitions, plan.urgent, plan.complete) == ([], [], True)


def test_a_full_lane_is_left_out() -> None:
    planning = Planning(A, BULK, max_jobs=2)
    planning.take(A, 2)
    assert planning.due() == {BULK}
    planning.limits.remove("interactive", 1)
    assert planning.due() == {A, BULK}


def test_a_poll_asks_for_no_more_records_than_the_emptiest_lane_takes_and_for_one_at_least() -> None:
    planning = Planning(A, BULK, max_jobs=7, max_poll_records=5)
    assert planning.plan().limit == 5
    planning.take(A, 4)
    planning.take(BULK, 3)
    assert planning.plan().limit == 4
    planning.take(A, 3)
    planning.take(BULK, 4)
    assert planning.plan().limit == 1


def test_only_where_not_all_are_asked_interactive_partitions_come_first() -> None:
    planning = Planning(A, B, BULK, max_poll_records=2)
    plan = planning.plan()
    planning.planner.note(plan, {BULK: "12"}, only_urgent=False)
    plan = planning.plan()
    assert set(plan.partitions) == set(plan.urgent) == {A, B}
    assert not plan.complete
    planning.planner.note(plan, {A: "12"}, only_urgent=True)
    plan = planning.plan()
    assert plan.partitions == plan.urgent == [B]


def test_a_poll_of_the_urgent_ones_that_was_not_filled_ends_no_turn() -> None:
    planning = Planning(A, B, BULK, max_poll_records=2)
    planning.planner.note(planning.plan(), {BULK: "12"}, only_urgent=False)
    planning.planner.note(planning.plan(), {A: "1"}, only_urgent=True)
    assert planning.due() == {A, B}
    planning.planner.note(planning.plan(), {}, only_urgent=False)
    assert planning.due() == {A, B, BULK}
