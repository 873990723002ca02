"""The loop that feeds the model: it forms micro-batches as `PrefetchLimit` allows, and runs each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic

from embedq_consumer.batching.batcher import Batcher, ItemT
from embedq_consumer.batching.head_start import HeadStart
from embedq_consumer.batching.prefetch import PrefetchLimit, UnderWay
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import LANES

RunBatch = Callable[[Sequence[ItemT]], Awaitable[float | None]]
"""Computes one micro-batch; done when the device is done with it. The seconds that the device took, if all went well."""


class BatchLoop(Generic[ItemT]):
    """Takes micro-batches in order and runs each in a task of `tasks`, so that a failure ends the process."""

    def __init__(
        self,
        batcher: Batcher[ItemT],
        run_batch: RunBatch[ItemT],
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
        *,
        late: bool = False,
        head_start: HeadStart | None = None,
    ) -> None:
        """`late`: each is formed shortly before the one that runs is done, and not as soon as that runs. `head_start` hears how
        long each took."""
        self._batcher = batcher
        self._run_batch = run_batch
        self._metrics = metrics
        self._tasks = tasks
        self._prefetch = PrefetchLimit(late=late)
        self._head_start = head_start or HeadStart()
        self._ended = asyncio.Event()
        self._counted = dict.fromkeys(LANES, 0)
        """Of this loop in the metric of what waits, which several may share."""

    async def run(self) -> None:
        """Run until cancelled."""
        self._batcher.note_idle(True)
        while True:
            await self._until_another_may_be_formed()
            batch = await self._batcher.next()
            tokens = sum(item.cost for item in batch)
            long = batch[0].cost > self._batcher.max_tokens
            one = self._prefetch.begin(time.monotonic(), tokens, long=long)
            self._batcher.note_idle(False)
            self._tasks.create_task(self._run(batch, one), name="micro_batch")
            await asyncio.sleep(0)  # it is on its way to the device before anything is counted
            self._observe(batch, tokens)

    async def _until_another_may_be_formed(self) -> None:
        while (pause := self._prefetch.due_in(time.monotonic())) > 0:
            self._ended.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(pause) else pause):
                    await self._ended.wait()

    async def _run(self, batch: Sequence[ItemT], one: UnderWay) -> None:
        seconds = None
        try:
            seconds = await self._run_batch(batch)
        finally:
            self._prefetch.end(one, time.monotonic(), seconds)
            if seconds is not None:
                self._head_start.ran(one.tokens, seconds)
            self._batcher.note_idle(self._prefetch.idle)
            self._ended.set()

    def _observe(self, batch: Sequence[ItemT], tokens: int) -> None:
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_fill.observe(min(1.0, tokens / self._batcher.max_tokens))
        for lane in LANES:
            now, before = self._batcher.waiting_tokens(lane), self._counted[lane]
            self._metrics.waiting_tokens.labels(lane).inc(now - before)
            self._counted[lane] = now
