"""Room for results that are being made, in bytes: one job may become 2,048 vectors."""

from __future__ import annotations

import asyncio
from collections import deque


class WeightedSemaphore:
    """Admits work in order while its weight fits; what is heavier than the whole room is admitted alone.

    Invariants: every `take` has one `give_back` of the same weight; nobody overtakes, so a heavy job is never starved.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, weight: int) -> None:
        """Wait for room."""
        if not self._waiting and self._fits(weight):
            self._taken += weight
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((weight, turn))
        await turn

    def give_back(self, weight: int) -> None:
        """The work is done."""
        self._taken -= weight
        if self._taken < 0:
            raise RuntimeError("more was given back than taken. This is a bug.")
        while self._waiting and self._fits(self._waiting[0][0]):
            weight, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._taken += weight
                turn.set_result(None)

    def _fits(self, weight: int) -> bool:
        return self._taken == 0 or self._taken + weight <= self._size
