"""The loop that feeds the model: one micro-batch runs, and exactly one more is assembled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from embedq_consumer.batching import LANES, Batcher
from embedq_consumer.flights import Item
from embedq_consumer.metrics import Metrics
from embedq_consumer.pipeline import Pipeline

_AHEAD: Final = 2
"""The micro-batch that runs, and the one that waits for it."""


class Worker:
    """Takes micro-batches in order and hands them to the pipeline."""

    def __init__(
        self,
        batcher: Batcher[Item],
        pipeline: Pipeline,
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
        max_tokens: int,
    ) -> None:
        self._batcher = batcher
        self._pipeline = pipeline
        self._metrics = metrics
        self._tasks = tasks
        self._max_tokens = max_tokens
        self._places = asyncio.Semaphore(_AHEAD)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            await self._places.acquire()
            batch = await self._batcher.next()
            self._observe(batch)
            self._tasks.create_task(self._run(batch), name="micro_batch")

    async def _run(self, batch: Sequence[Item]) -> None:
        try:
            await self._pipeline.run_batch(batch)
        finally:
            self._places.release()

    def _observe(self, batch: Sequence[Item]) -> None:
        tokens = sum(item.cost for item in batch)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_fill.observe(min(1.0, tokens / self._max_tokens))
        for lane in LANES:
            self._metrics.waiting_tokens.labels(lane).set(self._batcher.waiting_tokens(lane))
