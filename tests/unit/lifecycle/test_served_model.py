"""One alias in one object: the parts belong together, and its loops take what they are given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from embedq_consumer.batching.single_flight import Item
from embedq_consumer.engine import Tokens
from tests.helpers.fake_models import MakeBench
from tests.helpers.in_flight import admitted, item
from tests.helpers.support import wait_until


async def test_texts_put_into_its_batcher_are_run_in_micro_batches(bench: MakeBench) -> None:
    b = bench()
    job = admitted(input=["one", "two"])
    items = [item(job, index)[0] for index in (0, 1)]
    ran: list[Item] = []

    async def run(batch: Sequence[Item]) -> None:
        ran.extend(batch)

    async with asyncio.TaskGroup() as tasks:
        loop = tasks.create_task(b.model.run_batches(run, tasks))
        b.model.batcher.put(items)
        await wait_until(lambda: len(ran) == 2)
        loop.cancel()
    assert ran == items
    assert b.sample("batch_items_count") == 1


async def test_the_budget_in_force_is_that_of_the_model_that_serves(bench: MakeBench) -> None:
    b = bench()
    assert b.model.budget.longest == 512  # none was tried yet
    await b.model.start(None)
    assert b.model.budget.longest == 64
    vectors, _ = await b.model.slot.encode(b.model.slot.loaded.encoder, [Tokens(np.zeros(1, np.int32))])
    assert vectors.shape == (1, 2)
