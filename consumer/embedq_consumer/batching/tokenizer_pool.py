"""Threads that tokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from embedq_consumer.engine import Chunked, Encoder, Text, TextTooLong, Tokens

__all__ = ["CALLS", "TokenizerPool"]

_THREADS: Final = 2
"""The tokenizer uses all cores for one call; a second one runs while the first one's results become arrays."""
CALLS: Final = _THREADS + 1
"""Calls that should be given to the threads at once: those that run and the next. More would only delay texts that come."""


class TokenizerPool:
    """Tokenizes off the event loop. Calls run in their order."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="tokenize")

    async def run(self, encoder: Encoder, texts: Sequence[Text]) -> list[Tokens | Chunked | TextTooLong]:
        """What the model is given for each text, in order."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _tokens_of, encoder, texts)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _tokens_of(encoder: Encoder, texts: Sequence[Text]) -> list[Tokens | Chunked | TextTooLong]:
    """Tokens of each text, in order."""
    if all(text.chunk is None for text in texts):
        return [*encoder.tokenize(texts)]
    plain = iter(encoder.tokenize([text for text in texts if text.chunk is None]))
    chunked = iter(encoder.chunk([text for text in texts if text.chunk is not None]))
    return [next(plain) if text.chunk is None else next(chunked) for text in texts]
