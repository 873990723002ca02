"""The loop that feeds the model: one micro-batch runs, one is prefetched, and the next is assembled when one ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic

from embedq_consumer.batching.batcher import Batcher, ItemT
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import LANES

_QUICK_S: Final = 0.025
"""A micro-batch that takes less may be over before the event loop, busy with results, gets to assemble the next one."""

RunBatch = Callable[[Sequence[ItemT]], Awaitable[None]]
"""Computes one micro-batch; done when the device is done with it."""


class PrefetchLimit:
    """How many micro-batches may be under way at once. Pure: times are seconds of any monotonic clock.

    Invariants:
        - Two: one runs on the device and one is prefetched. More would only delay texts that arrive later.
        - Three while they are quick: the event loop, which assembles the next one, may be busy for as long as one takes.
        - Nothing is prefetched after a text over the budget until that is done. It takes so long that the gap does not
          count, and a text that arrives meanwhile waits for at most one such text.
    """

    def __init__(self) -> None:
        self._under_way = 0
        self._long = 0
        self._last_end = 0.0
        self._last_seconds = _QUICK_S  # on the device

    def allows_another(self) -> bool:
        """Whether the next one may be taken."""
        limit = 3 if self._last_seconds < _QUICK_S else 2
        return not self._long and self._under_way < limit

    @property
    def idle(self) -> bool:
        """Whether none is under way."""
        return not self._under_way

    def begin(self, *, long: bool) -> None:
        """One is taken; `long`: it is a text over the budget."""
        self._under_way += 1
        self._long += long

    def end(self, began: float, now: float, *, long: bool) -> None:
        """One is done; it had the device to itself from when the one before it ended."""
        self._under_way -= 1
        self._long -= long
        self._last_seconds = now - max(began, self._last_end)
        self._last_end = now


class BatchLoop(Generic[ItemT]):
    """Takes micro-batches in order and runs each in a task of `tasks`, so that a failure ends the process."""

    def __init__(
        self, batcher: Batcher[ItemT], run_batch: RunBatch[ItemT], metrics: Metrics, tasks: asyncio.TaskGroup
    ) -> None:
        self._batcher = batcher
        self._run_batch = run_batch
        self._metrics = metrics
        self._tasks = tasks
        self._prefetch = PrefetchLimit()
        self._ended = asyncio.Event()
        self._counted = dict.fromkeys(LANES, 0)
        """Of this loop in the metric of what waits, which several may share."""

    async def run(self) -> None:
        """Run until cancelled."""
        self._batcher.note_idle(True)
        while True:
            while not self._prefetch.allows_another():
                self._ended.clear()
                await self._ended.wait()
            batch = await self._batcher.next()
            long = batch[0].cost > self._batcher.max_tokens
            self._prefetch.begin(long=long)
            self._batcher.note_idle(False)
            self._tasks.create_task(self._run(batch, long), name="micro_batch")
            await asyncio.sleep(0)  # it is on its way to the device before anything is counted
            self._observe(batch)

    async def _run(self, batch: Sequence[ItemT], long: bool) -> None:
        began = time.monotonic()
        try:
            await self._run_batch(batch)
        finally:
            self._prefetch.end(began, time.monotonic(), long=long)
            self._batcher.note_idle(self._prefetch.idle)
            self._ended.set()

    def _observe(self, batch: Sequence[ItemT]) -> None:
        tokens = sum(item.cost for item in batch)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_fill.observe(min(1.0, tokens / self._batcher.max_tokens))
        for lane in LANES:
            now, before = self._batcher.waiting_tokens(lane), self._counted[lane]
            self._metrics.waiting_tokens.labels(lane).inc(now - before)
            self._counted[lane] = now
