"""So many at a time, and clients take turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Final

from embedq_consumer.fairness.fair_queue import FairQueue

_QUANTUM: Final = 1024 * 1024
"""A turn in the unit of the costs that are given: bytes of results."""


class Turns:
    """A semaphore whose waiters are let in in fair order by client, each weighed by its cost; a lock unless told otherwise."""

    def __init__(self, at_once: int = 1) -> None:
        self._waiting = FairQueue[Hashable, asyncio.Future[None]](_QUANTUM)
        self._at_once = at_once
        self._inside = 0

    @property
    def idle(self) -> bool:
        """Whether nobody is inside, and nobody waits."""
        return not self._inside and not self._waiting

    @asynccontextmanager
    async def turn(self, client: Hashable, cost: int) -> AsyncIterator[None]:
        """One of `at_once` inside."""
        if self._inside < self._at_once:
            self._inside += 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.put(client, turn, cost)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()  # let in at the same moment
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Let the next one in that still waits; until it runs its place stays taken."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._inside -= 1


class TurnsByPlace:
    """`Turns` for each of many places."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._turns: dict[Hashable, Turns] = {}

    @asynccontextmanager
    async def turn(self, place: Hashable, client: Hashable, cost: int) -> AsyncIterator[None]:
        """One of `at_once` inside, of those who want this place."""
        turns = self._turns.get(place)
        if turns is None:
            turns = self._turns[place] = Turns(self._at_once)
        try:
            async with turns.turn(client, cost):
                yield
        finally:
            if turns.idle:
                self._turns.pop(place, None)
