"""How much one client may have under way."""

from __future__ import annotations

import asyncio
from collections import deque


class WeightedSemaphore:
    """Texts and bytes under way, below two limits. First come, first served.

    When nothing is under way anything fits, so a job larger than the limit runs alone instead of never.
    """

    def __init__(self, max_texts: int, max_size: int) -> None:
        self._max_texts = max_texts
        self._max_size = max_size
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self.texts = 0
        self.size = 0

    def _fits(self, texts: int, size: int) -> bool:
        return self.texts == 0 or (
            self.texts + texts <= self._max_texts and self.size + size <= self._max_size
        )

    def take(self, texts: int, size: int) -> bool:
        """Take room now, or say that there is none."""
        if self._waiting or not self._fits(texts, size):
            return False
        self.texts += texts
        self.size += size
        return True

    async def wait_and_take(self, texts: int, size: int) -> None:
        """Take room when it is there and everyone who asked before has got theirs."""
        if self.take(texts, size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (texts, size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(texts, size)  # granted in the same moment
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._wake()
            raise

    def give_back(self, texts: int, size: int) -> None:
        """End of what `take` began."""
        self.texts -= texts
        self.size -= size
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            texts, size, turn = self._waiting[0]
            if turn.cancelled():  # and the one who waited has not run since
                self._waiting.popleft()
                continue
            if not self._fits(texts, size):
                return
            self._waiting.popleft()
            self.texts += texts
            self.size += size
            turn.set_result(None)
