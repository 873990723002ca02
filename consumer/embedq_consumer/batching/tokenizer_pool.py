"""Threads that tokenize."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from embedq_consumer.engine import Encoder, Found, Text
from embedq_consumer.threads import CLOSE_S, WorkerThreads

__all__ = ["CALLS", "TokenizerPool"]

_THREADS: Final = 2
"""The tokenizer uses all cores for one call; a second one runs while the first one's results become arrays."""
CALLS: Final = _THREADS + 1
"""Calls that should be given to the threads at once: those that run and the next. More would only delay texts that come."""


class TokenizerPool:
    """Tokenizes off the event loop. Calls run in their order."""

    def __init__(self) -> None:
        self._threads = WorkerThreads("tokenize", _THREADS)
        self._running: list[float] = []

    async def run(self, encoder: Encoder, texts: Sequence[Text]) -> list[Found]:
        """What the model is given for each text, in order."""
        return await self.start(encoder, texts)

    def start(self, encoder: Encoder, texts: Sequence[Text]) -> asyncio.Future[list[Found]]:
        """The same, begun at once."""
        return asyncio.wrap_future(self._threads.submit(self._tokens_of, encoder, texts))

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds since when the oldest call under way runs; None while none does."""
        return min(list(self._running), default=None)

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. A call that runs longer than this is left behind."""
        self._threads.close(within_s)

    def _tokens_of(self, encoder: Encoder, texts: Sequence[Text]) -> list[Found]:
        began = time.monotonic()
        self._running.append(began)
        try:
            return _tokens_of(encoder, texts)
        finally:
            self._running.remove(began)


def _tokens_of(encoder: Encoder, texts: Sequence[Text]) -> list[Found]:
    """Tokens of each text, in order."""
    if all(text.chunk is None for text in texts):
        return [*encoder.tokenize(texts)]
    plain = iter(encoder.tokenize([text for text in texts if text.chunk is None]))
    chunked = iter(encoder.chunk([text for text in texts if text.chunk is not None]))
    return [next(plain) if text.chunk is None else next(chunked) for text in texts]
