"""What tests and benchmarks say of others' waits: a stop shows, and what was before it does not hide it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.neighbors import Spread, Waits, spread


def steady(stop: tuple[float, float] | None) -> Waits:
    """Ten jobs a second for a minute, each answered after 10 ms, but for those that are under way in a stop: these at its end."""
    waits = Waits()
    for number in range(600):
        sent = number / 10
        waits.sent(f"{number}", sent)
        answered = sent + 0.01
        if stop and stop[0] <= answered and sent <= stop[1]:
            answered = stop[1] + 0.01
        waits.answered(f"{number}", answered)
    return waits


def test_a_stop_of_two_seconds_is_the_p99_of_those_that_it_met() -> None:
    found = spread(steady((30.0, 32.0)).between(29.0, 35.0))
    assert 1.9 < found.p99_s <= found.longest_s < 2.1
    assert found.p50_s == 0.01


def test_without_a_stop_nobody_waited() -> None:
    found = spread(steady(None).between(0.0, 60.0))
    assert found == Spread(jobs=600, p50_s=0.01, p99_s=0.01, longest_s=0.01)


def test_a_job_counts_if_it_was_under_way_at_some_time_between() -> None:
    waits = Waits()
    for id, sent, answered in (
        ("before", 0, 1),
        ("into", 0, 5),
        ("in", 4, 5),
        ("across", 0, 9),
        ("after", 7, 9),
    ):
        waits.sent(id, sent)
        waits.answered(id, answered)
    assert waits.between(3.0, 6.0) == [5, 1, 9]


def test_what_has_no_answer_is_open_and_a_second_answer_is_a_repeat() -> None:
    waits = Waits()
    waits.sent("one", 0.0)
    waits.sent("two", 0.0)
    for id in ("one", "one", "of somebody else", "of somebody else"):
        waits.answered(id, 1.0)
    assert (waits.open, waits.count, waits.repeats) == ({"two"}, 1, 1)


@given(st.lists(st.floats(0, 100), min_size=1))
def test_a_p99_is_a_wait_that_at_most_one_in_a_hundred_exceeds(waits: list[float]) -> None:
    found = spread(waits)
    assert found.p50_s <= found.p99_s <= found.longest_s
    assert sum(round(wait, 4) > found.p99_s for wait in waits) <= len(waits) / 100
