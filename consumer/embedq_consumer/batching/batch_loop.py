"""The loop that feeds the model: one micro-batch runs, one waits behind it, and the next is assembled when one ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic

from embedq_consumer.batching.batcher import Batcher, Item
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import LANES

_QUICK_S: Final = 0.025

Run = Callable[[Sequence[Item]], Awaitable[None]]
"""Computes one micro-batch; done when the device is done with it."""


class PrefetchLimit:
    """How many micro-batches may be under way at once. Pure: times are seconds of any monotonic clock.

    Invariants:
        - Two: one runs on the device and one waits behind it. More would only make a text wait that comes later.
        - Three while they are quick: the event loop, which assembles the next one, may be away for as long as one takes.
        - Nothing is taken behind a text over the budget until that is done. It takes so long that the gap does not
          count, and a text that comes meanwhile must not find a second one ahead of it.
    """

    def __init__(self) -> None:
        self._under_way = 0
        self._long = 0
        self._last_end = 0.0
        self._seconds = _QUICK_S  # that the last one took on the device

    def has_room(self) -> bool:
        """Whether the next one may be taken."""
        places = 3 if self._seconds < _QUICK_S else 2
        return not self._long and self._under_way < places

    def begin(self, *, long: bool) -> None:
        """One is under way; `long`: it is a text over the budget."""
        self._under_way += 1
        self._long += long

    def end(self, began: float, now: float, *, long: bool) -> None:
        """One is done; it had the device to itself from when the one before it ended."""
        self._under_way -= 1
        self._long -= long
        self._seconds = now - max(began, self._last_end)
        self._last_end = now


class BatchLoop(Generic[Item]):
    """Takes micro-batches in order and runs each in a task of `tasks`, so that a failure ends the process."""

    def __init__(
        self, batcher: Batcher[Item], run: Run[Item], metrics: Metrics, tasks: asyncio.TaskGroup
    ) -> None:
        self._batcher = batcher
        self._run_batch = run
        self._metrics = metrics
        self._tasks = tasks
        self._ahead = PrefetchLimit()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            while not self._ahead.has_room():
                self._ended.clear()
                await self._ended.wait()
            batch = await self._batcher.next()
            long = batch[0].cost > self._batcher.max_tokens
            self._ahead.begin(long=long)
            self._tasks.create_task(self._run(batch, long), name="micro_batch")
            self._observe(batch)

    async def _run(self, batch: Sequence[Item], long: bool) -> None:
        began = time.monotonic()
        try:
            await self._run_batch(batch)
        finally:
            self._ahead.end(began, time.monotonic(), long=long)
            self._ended.set()

    def _observe(self, batch: Sequence[Item]) -> None:
        tokens = sum(item.cost for item in batch)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_fill.observe(min(1.0, tokens / self._batcher.max_tokens))
        for lane in LANES:
            self._metrics.waiting_tokens.labels(lane).set(self._batcher.waiting_tokens(lane))
