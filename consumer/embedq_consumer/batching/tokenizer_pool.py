"""Threads that tokenize: few calls at a time, so that an interactive one never waits for many bulk ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Final

from embedq_consumer.engine import Chunked, Encoder, Failed, Text, TextTooLong, Tokens
from embedq_shared.topics import Lane

__all__ = ["TokenizerPool"]

_THREADS: Final = 2
"""The tokenizer uses all cores for one call; a second one runs while the first one's results become arrays."""
_BULK_CALLS: Final = _THREADS + 1
"""Bulk calls given to the threads: those that run and the next. More would only delay interactive texts."""


class TokenizerPool:
    """Tokenizes off the event loop. Calls of one lane run in their order."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="tokenize")
        self._bulk = asyncio.Semaphore(_BULK_CALLS)

    async def run(
        self, lane: Lane, encoder: Encoder, texts: Sequence[Text]
    ) -> list[Tokens | Chunked | TextTooLong | Failed]:
        """What the model is given for each text, in order. An interactive call waits for `_BULK_CALLS` others at most."""
        async with self._bulk if lane == "bulk" else nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self._threads, _tokens_of, encoder, texts)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _tokens_of(encoder: Encoder, texts: Sequence[Text]) -> list[Tokens | Chunked | TextTooLong | Failed]:
    """Tokens of each text, in order."""
    if all(text.chunk is None for text in texts):
        return [*encoder.tokenize(texts)]
    plain = iter(encoder.tokenize([text for text in texts if text.chunk is None]))
    chunked = iter(encoder.chunk([text for text in texts if text.chunk is not None]))
    return [next(plain) if text.chunk is None else next(chunked) for text in texts]
