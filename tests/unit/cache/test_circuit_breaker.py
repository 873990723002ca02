"""The circuit breaker, with plain numbers as time."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_consumer.cache.circuit_breaker import CircuitBreaker, Permit, State


def breaker(failures: int = 3, pause_s: float = 1.0, longest_pause_s: float = 8.0) -> CircuitBreaker:
    return CircuitBreaker(
        failures=failures, pause_s=pause_s, longest_pause_s=longest_pause_s, uniform=lambda low, high: 1.0
    )


def permitted(one: CircuitBreaker, now: float) -> Permit:
    permit = one.admit(now)
    assert permit is not None
    return permit


def state(one: CircuitBreaker) -> State:
    """A call, so that mypy does not think it constant."""
    return one.state


def opened(at: float = 0.0) -> CircuitBreaker:
    one = breaker(failures=1)
    one.failed(permitted(one, at), at)
    return one


def test_it_opens_after_that_many_failures_in_a_row() -> None:
    one = breaker(failures=3)
    for _ in range(2):
        one.failed(permitted(one, 0.0), 0.0)
    assert state(one) == "closed"
    one.failed(permitted(one, 0.0), 0.0)
    assert state(one) == "open"
    assert one.admit(0.0) is None


def test_a_success_in_between_starts_the_count_again() -> None:
    one = breaker(failures=2)
    for _ in range(5):
        one.failed(permitted(one, 0.0), 0.0)
        one.succeeded(permitted(one, 0.0))
    assert state(one) == "closed"


def test_one_probe_at_a_time_goes_through_after_the_pause() -> None:
    one = opened(at=0.0)
    assert one.admit(0.99) is None
    permitted(one, 1.0)
    assert one.admit(1.0) is None
    assert one.admit(100.0) is None


def test_a_successful_probe_closes_it() -> None:
    one = opened()
    one.succeeded(permitted(one, 1.0))
    assert state(one) == "closed"
    permitted(one, 1.0)


def test_each_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    one, now = opened(), 0.0
    for pause in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert one.admit(now + pause - 0.01) is None
        now += pause
        one.failed(permitted(one, now), now)


def test_a_recovery_makes_the_next_pause_short_again() -> None:
    one = opened()
    one.failed(permitted(one, 1.0), 1.0)
    one.succeeded(permitted(one, 3.0))
    assert not one.recovered(10.9)
    assert one.recovered(11.0)
    one.failed(permitted(one, 11.0), 11.0)
    assert one.admit(11.99) is None
    permitted(one, 12.0)


def test_one_that_opens_again_soon_goes_on_with_longer_pauses() -> None:
    one = opened()
    one.succeeded(permitted(one, 1.0))
    one.failed(permitted(one, 1.5), 1.5)
    assert one.admit(3.49) is None
    one.succeeded(permitted(one, 3.5))
    one.failed(permitted(one, 4.0), 4.0)
    assert one.admit(7.99) is None
    permitted(one, 8.0)


def test_an_abandoned_probe_leaves_the_next_caller_to_probe() -> None:
    one = opened()
    one.abandoned(permitted(one, 1.0))
    assert state(one) == "open"
    one.succeeded(permitted(one, 1.0))
    assert state(one) == "closed"


def test_an_abandoned_call_neither_fails_nor_excuses() -> None:
    one = breaker(failures=2)
    one.failed(permitted(one, 0.0), 0.0)
    one.abandoned(permitted(one, 0.0))
    one.failed(permitted(one, 0.0), 0.0)
    assert state(one) == "open"


def test_a_late_success_from_before_does_not_close_it() -> None:
    one = breaker(failures=1)
    early = permitted(one, 0.0)
    one.failed(permitted(one, 0.0), 0.0)
    one.succeeded(early)
    assert state(one) == "open"


def test_a_late_failure_from_before_does_not_fail_the_probe() -> None:
    one = breaker(failures=1)
    early = permitted(one, 0.0)
    one.failed(permitted(one, 0.0), 0.0)
    probe = permitted(one, 1.0)
    one.failed(early, 1.0)
    assert state(one) == "probing"
    one.succeeded(probe)
    assert state(one) == "closed"


@pytest.mark.parametrize(("chance", "probe_at"), [(0.0, 0.8), (1.0, 1.2)])
def test_the_pause_is_jittered(chance: float, probe_at: float) -> None:
    one = CircuitBreaker(
        failures=1, pause_s=1.0, jitter=0.2, uniform=lambda low, high: low + chance * (high - low)
    )
    one.failed(permitted(one, 0.0), 0.0)
    assert one.admit(probe_at - 0.001) is None
    permitted(one, probe_at + 0.001)


class BreakerMachine(RuleBasedStateMachine):
    """Any interleaving of calls: never two probes at once, and never stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = breaker(failures=2)
        self.running: list[tuple[Permit, str]] = []

    @rule()
    def ask(self) -> None:
        permit = self.breaker.admit(self.now)
        if permit is not None:
            self.running.append((permit, self.breaker.state))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def report(self, data: st.DataObject, outcome: str) -> None:
        permit, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        match outcome:
            case "succeeded":
                self.breaker.succeeded(permit)
            case "failed":
                self.breaker.failed(permit, self.now)
            case _:
                self.breaker.abandoned(permit)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def one_probe_runs_exactly_while_probing(self) -> None:
        probes = sum(state == "probing" for _, state in self.running)
        assert probes == (1 if self.breaker.state == "probing" else 0)

    @invariant()
    def an_open_breaker_lets_a_probe_through_in_the_end(self) -> None:
        if self.breaker.state == "open":
            assert self.breaker._probe_at <= self.now + 8.0


TestBreakerMachine = BreakerMachine.TestCase
