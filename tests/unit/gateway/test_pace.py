"""How long a peer may take: each phase of a connection has its bound, and a request that moves on has none of the one before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.http.pace import Bounds, Pace


def phase_of(pace: Pace) -> str:
    """A type checker would take the phase of the last assertion for lasting."""
    return pace.phase


BOUNDS = Bounds(connections=10, head_bytes=1000, head_s=10, idle_s=60, body_bytes_per_s=100)


def test_a_connection_that_never_sends_is_closed_and_not_told() -> None:
    pace = Pace(BOUNDS, now=0)
    assert pace.late(60) is None
    late = pace.late(60.1)
    assert late is not None
    assert not late.tell


def test_a_head_that_comes_byte_by_byte_has_its_time_from_its_first_byte() -> None:
    pace = Pace(BOUNDS, now=0)
    for second in range(50, 60):
        pace.received(1, now=second)
    assert pace.late(60) is None
    late = pace.late(60.1)
    assert late is not None
    assert late.tell


def test_a_head_may_be_so_long_and_no_longer() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(1000, now=0)
    assert not pace.too_long_a_head
    pace.received(1, now=0)
    assert pace.too_long_a_head
    pace.head_ended(now=0)
    assert not pace.too_long_a_head


def test_a_head_that_cannot_be_too_long_need_not_be_measured() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(1000, now=0)
    assert pace.short_enough_a_head
    pace.received(1, now=0)
    assert not pace.short_enough_a_head, "what came with it may be its body, or not"
    pace.head_ended(now=0)
    pace.body_ended(now=0)
    assert not pace.short_enough_a_head, "a head that was sent ahead came with the request before"


def test_a_body_must_come_at_a_least_speed_after_a_while() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(10, now=0)
    pace.head_ended(now=0)
    assert pace.late(10) is None
    assert pace.late(10.1) is not None
    pace.received(5000, now=10)
    assert pace.late(60) is None, "5,000 bytes have 50 s more"
    assert pace.late(60.1) is not None


def test_an_answer_may_take_as_long_as_it_does_unless_the_peer_does_not_take_it() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(10, now=0)
    pace.head_ended(now=0)
    pace.body_ended(now=0)
    assert pace.late(1e6) is None
    pace.stuck(now=1e6)
    assert pace.late(1e6 + 30) is None
    assert pace.late(1e6 + 31) is not None
    pace.flows()
    assert pace.late(1e6 + 31) is None
    pace.answered(now=1e6)
    assert phase_of(pace) == "idle"


def test_the_rest_of_a_refused_body_has_a_few_seconds_and_then_the_connection_is_good_again() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(10, now=0)
    pace.head_ended(now=0)
    pace.answered(now=1)
    assert phase_of(pace) == "rest"
    assert pace.late(6) is None
    assert pace.late(6.1) is not None
    pace.body_ended(now=3)
    assert phase_of(pace) == "idle"


def test_a_request_sent_ahead_is_answered_after_the_first_one() -> None:
    pace = Pace(BOUNDS, now=0)
    pace.received(20, now=0)
    pace.head_ended(now=0)
    pace.body_ended(now=0)
    pace.head_ended(now=0)
    pace.body_ended(now=0)
    assert phase_of(pace) == "answer"
    pace.answered(now=100, next_one=True)
    assert phase_of(pace) == "answer"
    assert pace.late(1000) is None
    pace.answered(now=1000)
    assert phase_of(pace) == "idle"


@given(gaps=st.lists(st.floats(min_value=0.1, max_value=5), min_size=1, max_size=200))
def test_whoever_sends_a_byte_now_and_then_is_late_within_the_time_of_a_head_or_a_body(
    gaps: list[float],
) -> None:
    """However it spreads its bytes: a request's head and a body of some bytes end within twice the bound, or it is late."""
    pace = Pace(BOUNDS, now=0)
    now = 0.0
    pace.received(1, now)
    for gap in gaps:
        now += gap
        if pace.late(now) is not None:
            assert now > BOUNDS.head_s
            return
        pace.received(1, now)
    assert now <= BOUNDS.head_s
