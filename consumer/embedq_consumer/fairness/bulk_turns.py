"""Bulk work on the event loop, in turns: one piece in a round of the loop while interactive work comes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from embedq_consumer.fairness.traffic import InteractiveTraffic


class BulkTurns:
    """Lets pieces of bulk work run one after the other, each in a round of the event loop of its own.

    Whatever is ready on the loop waits for all else that is ready, and an interactive job becomes ready some twenty times on
    its way: with a flood's answers, starts and records all in one round it waits twenty times for all of them. So while
    interactive work comes, all that is bulk has one turn in a round together. The loop is as busy as before.

    Invariants:
        - While pieces wait, a round of the loop runs one of them, in the order in which they came.
        - Without interactive work nothing waits, and nothing is delayed by a round.
    """

    def __init__(self, traffic: InteractiveTraffic, clock: Callable[[], float] = time.monotonic) -> None:
        self.traffic = traffic
        self._clock = clock
        self._waiting: deque[Callable[[], object]] = deque()

    @property
    def needed(self) -> bool:
        """Whether a piece would wait for its turn: interactive work came lately, or other pieces wait."""
        return bool(self._waiting) or self.traffic.lately(self._clock())

    async def turn(self) -> None:
        """Return when it is the caller's turn; at once while none is needed."""
        if self.needed:
            turn = asyncio.get_running_loop().create_future()
            self.soon(lambda: None if turn.done() else turn.set_result(None))
            await turn

    def soon(self, piece: Callable[[], object]) -> None:
        """Call `piece` in its turn, which is never now."""
        self._waiting.append(piece)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._run_next)

    def _run_next(self) -> None:
        piece = self._waiting[0]
        try:
            piece()
        finally:
            self._waiting.popleft()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._run_next)
