"""A thread for each part that may block, and patience with a target that is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from embedq_batch.errors import TargetAway
from embedq_batch.running.progress import Progress
from embedq_shared.backoff import backoff

_T = TypeVar("_T")


class Thread:
    """One thread, for a source or a target that may block and knows one thread alone."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function there. When the caller is cancelled it still ends there before the next one begins."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def close(self) -> None:
        """Wait for the last one."""
        await asyncio.to_thread(self._executor.shutdown)


async def patiently(
    thread: Thread,
    progress: Progress,
    function: Callable[..., _T],
    *arguments: Any,
    leaving: asyncio.Event | None = None,
) -> _T:
    """Call the target, for as long as it is away. What was written before is written again, which changes nothing.

    Raises:
        TargetAway: it is, and `leaving` is set, so that nobody waits for it any more.
    """
    attempt = 0
    leaving = leaving or asyncio.Event()
    while True:
        try:
            done = await thread(function, *arguments)
        except TargetAway as away:
            if leaving.is_set():
                raise
            progress.waiting = str(away)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff(attempt, first_s=0.5, longest_s=10.0)):
                    await leaving.wait()
            attempt += 1
            continue
        if attempt:
            progress.waiting = None
        return done
