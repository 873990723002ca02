"""Threads that tokenize, and what needs none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from embedq_consumer.engine import Chunked, Encoder, Failed, Text, TextTooLong, Tokens
from embedq_consumer.threads import CLOSE_S, WorkerThreads

__all__ = ["CALLS", "TokenizerPool"]

_THREADS: Final = 2
"""The tokenizer uses all cores for one call; a second one runs while the first one's results become arrays."""
CALLS: Final = _THREADS + 1
"""Calls that should be given to the threads at once: those that run and the next. More would only delay texts that come."""


_QUICK_TEXTS: Final = 4
_QUICK_CHARACTERS: Final = 512
"""A call of no more than these takes 30 to 200 µs: less than waking a thread, and being woken by it, on an idle machine, and much
less on a busy one."""


class TokenizerPool:
    """Tokenizes off the event loop, but for a quick call, which runs at once. The others run in their order."""

    def __init__(self) -> None:
        self._threads = WorkerThreads("tokenize", _THREADS)
        self._running: list[float] = []

    async def run(
        self, encoder: Encoder, texts: Sequence[Text]
    ) -> list[Tokens | Chunked | TextTooLong | Failed]:
        """What the model is given for each text, in order."""
        if _quick(texts):
            return self._tokens_of(encoder, texts)
        return await asyncio.wrap_future(self._threads.submit(self._tokens_of, encoder, texts))

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds since when the oldest call under way runs; None while none does."""
        return min(list(self._running), default=None)

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. A call that runs longer than this is left behind."""
        self._threads.close(within_s)

    def _tokens_of(
        self, encoder: Encoder, texts: Sequence[Text]
    ) -> list[Tokens | Chunked | TextTooLong | Failed]:
        began = time.monotonic()
        self._running.append(began)
        try:
            return _tokens_of(encoder, texts)
        finally:
            self._running.remove(began)


def _quick(texts: Sequence[Text]) -> bool:
    return (
        len(texts) <= _QUICK_TEXTS
        and sum([len(text.text) + len(text.prompt) for text in texts]) <= _QUICK_CHARACTERS
        and all(text.chunk is None for text in texts)
    )


def _tokens_of(encoder: Encoder, texts: Sequence[Text]) -> list[Tokens | Chunked | TextTooLong | Failed]:
    """Tokens of each text, in order."""
    if all(text.chunk is None for text in texts):
        return [*encoder.tokenize(texts)]
    plain = iter(encoder.tokenize([text for text in texts if text.chunk is None]))
    chunked = iter(encoder.chunk([text for text in texts if text.chunk is not None]))
    return [next(plain) if text.chunk is None else next(chunked) for text in texts]
