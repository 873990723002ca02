"""How much may be in flight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.intake.flow_control import InFlightLimits
from embedq_shared.topics import LANES, Lane


def flow(max_jobs: int = 4, max_bytes: int = 1000) -> InFlightLimits:
    return InFlightLimits(max_jobs=max_jobs, max_bytes=max_bytes)


def test_a_lane_is_full_once_it_holds_as_many_jobs_as_allowed() -> None:
    bounded = flow(max_jobs=2)
    bounded.take("bulk", 1)
    assert not bounded.is_full("bulk")
    bounded.take("bulk", 1)
    assert bounded.is_full("bulk")
    assert not bounded.is_full("interactive")


def test_a_lane_is_full_once_it_holds_as_many_bytes_as_allowed() -> None:
    bounded = flow(max_bytes=100)
    bounded.take("interactive", 100)
    assert bounded.is_full("interactive")


def test_a_full_lane_takes_records_again_when_half_of_it_is_left() -> None:
    bounded = flow(max_jobs=4)
    for _ in range(4):
        bounded.take("bulk", 1)
    assert bounded.release("bulk", 1) is False
    assert bounded.is_full("bulk")
    assert bounded.release("bulk", 1) is True
    assert not bounded.is_full("bulk")


def test_only_the_release_that_opens_the_lane_says_so() -> None:
    bounded = flow(max_jobs=2)
    bounded.take("bulk", 1)
    assert bounded.release("bulk", 1) is False


def test_room_is_that_of_the_emptiest_lane_that_still_takes_jobs() -> None:
    bounded = flow(max_jobs=4)
    assert bounded.room() == 4
    bounded.take("interactive", 1)
    for _ in range(4):
        bounded.take("bulk", 1)
    assert bounded.room() == 3
    for _ in range(3):
        bounded.take("interactive", 1)
    assert bounded.room() == 0


def test_releasing_more_than_was_taken_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="bug"):
        flow().release("bulk", 1)


@given(st.lists(st.tuples(st.sampled_from(LANES), st.integers(0, 400)), max_size=40), st.randoms())
def test_with_nothing_in_flight_all_counts_are_zero_and_no_lane_is_full(
    jobs: list[tuple[Lane, int]], random: object
) -> None:
    bounded = flow()
    for lane, size in jobs:
        bounded.take(lane, size)
    assert bounded.idle is (not jobs)
    for lane in LANES:
        assert bounded.jobs(lane) == sum(where == lane for where, _ in jobs)
        assert bounded.bytes(lane) == sum(size for where, size in jobs if where == lane)
    random.shuffle(jobs)  # type: ignore[attr-defined]
    for lane, size in jobs:
        bounded.release(lane, size)
    assert bounded.idle
    assert not any(bounded.is_full(lane) or bounded.jobs(lane) or bounded.bytes(lane) for lane in LANES)
