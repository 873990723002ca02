"""A semaphore whose holders have weights: at most n texts and m bytes at once, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque


class WeightedSemaphore:
    """Admits work in order while its weights fit the limits; while nothing is held, anything is admitted.

    Each limit has a weight of its own, in the same order: `WeightedSemaphore(1000, 64_000_000)` admits
    `acquire(texts, size)`. The idea is that of golang.org/x/sync/semaphore.Weighted.

    Invariants:
        - What is acquired is released once, in one piece or in several.
        - Waiters never overtake, so heavy work is never starved; and what is heavier than a limit runs alone, not never.
        - A waiter that is cancelled holds nothing, even if it was admitted in the same moment.
    """

    def __init__(self, *limits: int) -> None:
        self._limits = limits
        self._held = [0] * len(limits)
        self._waiting: deque[tuple[tuple[int, ...], asyncio.Future[None]]] = deque()

    @property
    def held(self) -> tuple[int, ...]:
        """What is held of each limit."""
        return tuple(self._held)

    def try_acquire(self, *weights: int) -> bool:
        """Acquire now; False if that is not possible without waiting."""
        if self._waiting or not self._fits(weights):
            return False
        self._add(weights)
        return True

    async def acquire(self, *weights: int) -> None:
        """Wait until all earlier waiters have been admitted and the weights fit."""
        if self.try_acquire(*weights):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (weights, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(*weights)  # admitted in the same moment
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._admit()
            raise

    def release(self, *weights: int) -> None:
        """End what `acquire` began."""
        for at, weight in enumerate(weights):
            self._held[at] -= weight
        if min(self._held) < 0:
            raise RuntimeError("more was released than acquired. This is a bug.")
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            weights, turn = self._waiting[0]
            if turn.cancelled():  # and its task has not run since
                self._waiting.popleft()
                continue
            if not self._fits(weights):
                return
            self._waiting.popleft()
            self._add(weights)
            turn.set_result(None)

    def _fits(self, weights: tuple[int, ...]) -> bool:
        return not any(self._held) or all(
            held + weight <= limit
            for held, weight, limit in zip(self._held, weights, self._limits, strict=True)
        )

    def _add(self, weights: tuple[int, ...]) -> None:
        for at, weight in enumerate(weights):
            self._held[at] += weight
