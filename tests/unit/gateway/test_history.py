"""Points of the last minutes: rates between two samples, gaps, and what grows old."""

from __future__ import annotations

from embedq_gateway.operations.history import History, Point


def test_a_point_says_what_waits_and_what_was_answered_since_the_one_before() -> None:
    history = History()
    history.add(100, {"interactive": 1, "bulk": 2}, tokens=1000)
    assert history.points() == []
    history.add(105, {"interactive": 3, "bulk": 0}, tokens=1500)
    assert history.points() == [Point(at=105, lag={"interactive": 3, "bulk": 0}, tokens_per_s=100.0)]


def test_a_count_that_begins_anew_is_no_negative_rate_and_an_unknown_lag_a_gap() -> None:
    history = History()
    history.add(0, None, tokens=50)
    history.add(10, None, tokens=10)
    assert history.points() == [Point(at=10, lag=None, tokens_per_s=0.0)]


def test_a_clock_that_is_set_back_adds_nothing() -> None:
    history = History()
    history.add(10, None, tokens=0)
    history.add(5, None, tokens=10)
    assert len(history) == 0


def test_old_points_are_dropped() -> None:
    history = History(kept_s=60)
    for second in range(0, 600, 5):
        history.add(second, {}, tokens=second)
    assert len(history) == 13
    assert history.points()[0].at == 535
