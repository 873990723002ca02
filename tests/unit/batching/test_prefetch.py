"""When another micro-batch may be formed, with plain numbers as time."""

from __future__ import annotations

import math

import pytest

from embedq_consumer.batching.prefetch import QUICK_S, PrefetchLimit, UnderWay


def after_one_of(pace: float, *, late: bool = False) -> PrefetchLimit:
    """One micro-batch of 100 tokens is done, which took so many seconds a token; now is 0."""
    prefetch = PrefetchLimit(late=late)
    prefetch.end(begin(prefetch, -100 * pace, 100), 0.0, 100 * pace)
    return prefetch


def begin(prefetch: PrefetchLimit, now: float = 0.0, tokens: int = 100, *, long: bool = False) -> UnderWay:
    return prefetch.begin(now, tokens, long=long)


def test_one_runs_and_one_is_prefetched() -> None:
    prefetch = PrefetchLimit()
    assert prefetch.idle
    assert prefetch.due_in(0.0) == 0
    first = begin(prefetch)
    assert not prefetch.idle
    assert prefetch.due_in(0.0) == 0
    begin(prefetch)
    assert prefetch.due_in(0.0) == math.inf
    prefetch.end(first, 0.2, 0.2)
    assert prefetch.due_in(0.2) == 0


def test_quick_ones_allow_two_to_be_prefetched_and_slow_ones_again_one() -> None:
    prefetch = after_one_of(0.00003)
    first, second = begin(prefetch), begin(prefetch)
    assert prefetch.due_in(0.0) == 0
    third = begin(prefetch)
    assert prefetch.due_in(0.0) == math.inf
    for one, now in ((first, 0.1), (second, 0.2), (third, 0.3)):
        prefetch.end(one, now, 0.1)
    for number in range(8):  # until the quick one is forgotten
        prefetch.end(begin(prefetch, number), number + 0.1, 0.1)
    begin(prefetch, 10.0)
    assert prefetch.due_in(10.0) == 0
    begin(prefetch, 10.0)
    assert prefetch.due_in(10.0) == math.inf


def test_a_small_one_that_was_quick_does_not_make_whole_ones_quick() -> None:
    """Else a newcomer's own would put a third whole one before its next."""
    prefetch = after_one_of(0.002)
    small = begin(prefetch, 0.0, tokens=5)
    begin(prefetch)
    assert prefetch.due_in(0.0) == math.inf
    prefetch.end(small, 0.01, 0.01)
    begin(prefetch, 0.01)
    assert prefetch.due_in(0.01) == math.inf


@pytest.mark.parametrize("late", [True, False])
def test_nothing_is_prefetched_after_a_text_over_the_budget(*, late: bool) -> None:
    prefetch = after_one_of(0.0001, late=late)
    first = begin(prefetch)
    assert prefetch.due_in(0.0) == 0  # it may itself be prefetched
    long = begin(prefetch, long=True)
    prefetch.end(first, 0.2, 0.2)
    assert prefetch.due_in(0.2) == math.inf
    prefetch.end(long, 1.0, 0.8)
    assert prefetch.due_in(1.0) == 0


def test_a_late_one_is_formed_when_the_one_that_runs_is_nearly_over() -> None:
    prefetch = after_one_of(0.002, late=True)
    first = begin(prefetch)
    assert prefetch.due_in(0.0) == pytest.approx(0.2 - QUICK_S)
    assert prefetch.due_in(0.1) == pytest.approx(0.1 - QUICK_S)
    assert prefetch.due_in(0.2 - QUICK_S / 2) == 0
    assert prefetch.due_in(0.5) == 0  # it takes longer than any before
    second = begin(prefetch, 0.19)
    assert prefetch.due_in(0.19) == pytest.approx(0.01 + 0.2 - QUICK_S)
    assert prefetch.due_in(0.5) == pytest.approx(0.2 - QUICK_S), "the second one does not run yet"
    prefetch.end(first, 0.21, 0.21)
    assert prefetch.due_in(0.21) == pytest.approx(0.2 - QUICK_S)
    prefetch.end(second, 0.41, 0.2)
    assert prefetch.due_in(0.41) == 0


def test_the_next_late_one_is_formed_before_a_small_one_runs() -> None:
    prefetch = after_one_of(0.002, late=True)
    begin(prefetch, 0.0, tokens=10)
    assert prefetch.due_in(0.0) == 0
    begin(prefetch, 0.0, tokens=2)
    assert prefetch.due_in(0.0) == 0
    begin(prefetch)
    assert prefetch.due_in(0.0) == math.inf


def test_the_fastest_of_late_counts_so_that_a_wrong_guess_is_an_early_one() -> None:
    prefetch = after_one_of(0.001, late=True)
    prefetch.end(begin(prefetch, 1.0), 1.5, 0.5)
    begin(prefetch, 2.0)
    assert prefetch.due_in(2.0) == pytest.approx(0.1 - QUICK_S)


@pytest.mark.parametrize("late", [True, False])
def test_one_that_failed_says_nothing_of_the_pace(*, late: bool) -> None:
    prefetch = PrefetchLimit(late=late)
    prefetch.end(begin(prefetch), 0.001, None)
    begin(prefetch, 1.0)
    assert prefetch.due_in(1.0) == 0
    begin(prefetch, 1.0)
    assert prefetch.due_in(1.0) == math.inf
