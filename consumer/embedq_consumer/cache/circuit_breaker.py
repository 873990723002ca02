"""When to leave a failing dependency alone. Pure: time and chance are arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, NewType

Permit = NewType("Permit", int)
"""Proof that the breaker let a call through; its outcome counts only while that decision still stands."""

State = Literal["closed", "open", "probing"]


class CircuitBreaker:
    """Opens after `failures` failures in a row, then lets one probe at a time through.

    closed → open: `failures` admitted calls in a row failed.
    open → probing: the pause is over and somebody asks; only that caller is admitted.
    probing → closed: the probe succeeded. probing → open: it failed, and the pause doubles, up to `longest_pause_s`.

    Every pause is jittered by ±`jitter`, so that replicas do not return together. An outcome that belongs to an
    earlier state is ignored: a call that began before the breaker opened neither closes it nor fails the probe.
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

    @property
    def state(self) -> State:
        return self._state

    def admit(self, now: float) -> Permit | None:
        """Ask before a call. Who is admitted reports back once, by `succeeded`, `failed` or `abandoned`."""
        if self._state == "closed":
            return Permit(self._era)
        if self._state == "open" and now >= self._probe_at:
            self._enter("probing")
            return Permit(self._era)
        return None

    def succeeded(self, admission: Permit) -> None:
        if admission != self._era:
            return
        self._failed_in_a_row = 0
        if self._state == "probing":
            self._pause = self._shortest
            self._enter("closed")

    def failed(self, admission: Permit, now: float) -> None:
        if admission != self._era:
            return
        self._failed_in_a_row += 1
        if self._state == "probing":
            self._pause = min(2 * self._pause, self._longest)
        elif self._failed_in_a_row < self._limit:
            return
        self._probe_at = now + self._pause * self._uniform(1 - self._jitter, 1 + self._jitter)
        self._enter("open")

    def abandoned(self, admission: Permit) -> None:
        """The call was cancelled, which says nothing about the dependency: the next caller may probe."""
        if admission == self._era and self._state == "probing":
            self._enter("open")

    def _enter(self, state: State) -> None:
        self._state = state
        self._era += 1
