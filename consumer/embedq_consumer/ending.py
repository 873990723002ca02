"""Ends aiokafka's clients. Their `stop` waits for ever while the brokers are gone, or raises its own cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def ended(stop: Coroutine[Any, Any, None], within: float) -> str | None:
    """Run a client's `stop` for so many seconds at most. None if it went well, else what happened, in a word.

    It runs as a task: a fetch that it cancels lets `stop` itself end with CancelledError, which must not pass for
    a cancellation of ours.
    """
    stopping = asyncio.ensure_future(stop)
    await asyncio.wait({stopping}, timeout=within)
    if not stopping.done():
        stopping.cancel()
        return "TimeoutError"
    if stopping.cancelled():
        return "CancelledError"
    failure = stopping.exception()
    return None if failure is None else type(failure).__name__
