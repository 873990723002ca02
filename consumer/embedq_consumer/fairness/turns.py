"""One at a time, and clients take turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Final

from embedq_consumer.fairness.fair_queue import FairQueue

_QUANTUM: Final = 1024 * 1024
"""A turn in the unit of the costs that are given: bytes of results."""


class Turns:
    """A lock whose waiters are let in in fair order by client, each weighed by its cost."""

    def __init__(self) -> None:
        self._waiting = FairQueue[Hashable, asyncio.Future[None]](_QUANTUM)
        self._taken = False

    @asynccontextmanager
    async def turn(self, client: Hashable, cost: int) -> AsyncIterator[None]:
        """Alone inside."""
        if self._taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.put(client, turn, cost)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()  # let in at the same moment
                raise
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Let the next one in that still waits; until it runs the lock stays taken."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
