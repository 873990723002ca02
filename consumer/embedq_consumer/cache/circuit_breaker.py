"""When to leave a failing dependency alone. Pure: time and chance are arguments."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Literal, NewType

Permit = NewType("Permit", int)
"""Proof that the breaker let a call through; the call's outcome counts only while that decision still stands."""

State = Literal["closed", "open", "probing"]


class CircuitBreaker:
    """Opens after `failures` failures in a row, then lets one probe at a time through.

    Invariants:

    - closed → open: `failures` permitted calls in a row failed.
    - open → probing: the pause is over and a caller asks; only that caller gets a permit.
    - probing → closed: the probe succeeded.
    - probing → open: the probe failed, and the pause doubles, up to `longest_pause_s`.
    - One that opens again within `longest_pause_s` of a probe that succeeded has not recovered: its pause doubles, too.
    - An outcome that belongs to an earlier state is ignored: a call that began before the breaker opened neither closes
      it nor fails the probe.
    - Every pause is jittered by ±`jitter`, so that replicas do not return together.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        pause_s: float = 0.5,
        longest_pause_s: float = 15.0,
        jitter: float = 0.2,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._limit = failures
        self._shortest = pause_s
        self._longest = longest_pause_s
        self._jitter = jitter
        self._uniform = uniform
        self._state: State = "closed"
        self._era = 0
        self._failed_in_a_row = 0
        self._pause = pause_s
        self._probe_at = 0.0
        self._probed_at = -math.inf

    @property
    def state(self) -> State:
        """`closed` while calls are let through, `open` while none is, `probing` while one probe is under way."""
        return self._state

    def recovered(self, now: float) -> bool:
        """Whether it is closed, and has been for so long that what opens it next is another failure."""
        return self._state == "closed" and now - self._probed_at >= self._longest

    def admit(self, now: float) -> Permit | None:
        """Ask before a call. The caller that gets a permit reports once, by `succeeded`, `failed` or `abandoned`."""
        if self._state == "closed":
            return Permit(self._era)
        if self._state == "open" and now >= self._probe_at:
            self._enter("probing")
            self._probed_at = now
            return Permit(self._era)
        return None

    def succeeded(self, permit: Permit) -> None:
        """The dependency answered: closes the breaker if this was the probe."""
        if permit != self._era:
            return
        self._failed_in_a_row = 0
        if self._state == "probing":
            self._enter("closed")

    def failed(self, permit: Permit, now: float) -> None:
        """The dependency did not answer: opens the breaker if this was the probe, or one failure too many."""
        if permit != self._era:
            return
        self._failed_in_a_row += 1
        if self._state == "closed" and self._failed_in_a_row < self._limit:
            return
        self._pause = self._shortest if self.recovered(now) else min(2 * self._pause, self._longest)
        self._probe_at = now + self._pause * self._uniform(1 - self._jitter, 1 + self._jitter)
        self._enter("open")

    def abandoned(self, permit: Permit) -> None:
        """The call was cancelled, which says nothing about the dependency: the next caller may probe."""
        if permit == self._era and self._state == "probing":
            self._enter("open")

    def _enter(self, state: State) -> None:
        self._state = state
        self._era += 1
