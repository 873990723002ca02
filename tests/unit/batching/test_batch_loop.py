"""The loop around a batcher: which micro-batches it runs, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Lane
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until


@dataclass(frozen=True)
class Item:
    number: int
    cost: int
    lane: Lane = "interactive"
    arrived: float = 0.0
    client: bytes = b""
    job: int = 0


@dataclass
class Device:
    """Runs what it is given until the test ends it."""

    started: list[list[int]] = field(default_factory=list)
    ends: list[asyncio.Future[float | None]] = field(default_factory=list)

    async def run(self, batch: Sequence[Item]) -> float | None:
        self.started.append([item.number for item in batch])
        self.ends.append(asyncio.get_running_loop().create_future())
        return await self.ends[-1]


@asynccontextmanager
async def working(
    device: Device, *costs: int, metrics: Metrics | None = None, max_wait: float = 0.0, late: bool = False
) -> AsyncIterator[Batcher[Item]]:
    """A loop around a budget of 100 tokens, with these texts waiting."""
    batcher = Batcher[Item](BatchPolicy(max_tokens=100, max_items=10, max_wait=max_wait, bulk_max_wait=5.0))
    batcher.put(Item(number, cost) for number, cost in enumerate(costs))
    async with asyncio.TaskGroup() as tasks:
        loop = tasks.create_task(BatchLoop(batcher, device.run, metrics or Metrics(), tasks, late=late).run())
        yield batcher
        loop.cancel()
        for end in device.ends:
            end.cancel()


async def settled() -> None:
    """Everything that is ready to run has run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_next_micro_batch_is_assembled_when_one_ends_and_not_before() -> None:
    device = Device()
    async with working(device, 60, 60, 60) as batcher:
        await wait_until(lambda: device.started == [[0], [1]], within=10)
        await settled()
        assert device.started == [[0], [1]]
        batcher.put([Item(3, 40)])  # in time for the third, which is not assembled yet
        device.ends[0].set_result(None)
        await wait_until(lambda: device.started == [[0], [1], [2, 3]], within=10)


async def test_a_late_one_holds_who_came_while_the_one_before_it_ran() -> None:
    device = Device()
    async with working(device, 60, 60, 60, 60, late=True) as batcher:
        await wait_until(lambda: device.started == [[0], [1]], within=10)  # no pace is known yet
        device.ends[0].set_result(60.0)  # a second a token
        await settled()
        assert device.started == [[0], [1]]
        batcher.put([Item(4, 40)])
        device.ends[1].set_result(60.0)
        await wait_until(lambda: device.started == [[0], [1], [2, 4]], within=10)


async def test_a_late_one_is_formed_before_the_one_that_runs_is_done() -> None:
    device = Device()
    async with working(device, 60, 60, 60, late=True):
        await wait_until(lambda: device.started == [[0], [1]], within=10)
        device.ends[0].set_result(0.06)  # a millisecond a token
        await wait_until(lambda: device.started == [[0], [1], [2]], within=10)
        assert not device.ends[1].done()


async def test_a_text_waits_for_others_only_while_the_device_has_something_to_do() -> None:
    device = Device()
    async with working(device, max_wait=3600.0) as batcher:
        now = asyncio.get_running_loop().time()
        batcher.put([Item(0, 10, arrived=now)])
        await wait_until(lambda: device.started == [[0]], within=10)
        batcher.put([Item(1, 10, arrived=now)])
        batcher.put([Item(2, 10, arrived=now)])
        await settled()
        assert device.started == [[0]]
        device.ends[0].set_result(None)
        await wait_until(lambda: device.started == [[0], [1, 2]], within=10)


async def test_a_short_text_goes_before_the_next_of_many_long_ones() -> None:
    device = Device()
    async with working(device, 500, 500, 500) as batcher:
        await wait_until(lambda: device.started == [[0]], within=10)
        await settled()
        batcher.put([Item(3, 10)])
        await settled()
        assert device.started == [[0]]
        device.ends[0].set_result(None)
        await wait_until(lambda: device.started == [[0], [3], [1]], within=10)


async def test_a_micro_batch_that_fails_ends_the_loop() -> None:
    class Broken(Exception): ...

    async def run(batch: Sequence[Item]) -> float | None:
        raise Broken

    batcher = Batcher[Item](BatchPolicy(max_tokens=100, max_items=10, max_wait=0.0, bulk_max_wait=5.0))
    batcher.put([Item(0, 1)])
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(BatchLoop(batcher, run, Metrics(), tasks).run())
    assert raised.value.subgroup(Broken) is not None


async def test_the_size_of_each_micro_batch_and_what_still_waits_is_measured() -> None:
    device, metrics = Device(), Metrics()

    def sample(name: str, **labels: str) -> float | None:
        return sample_value(metrics.registry, f"embedq_{name}", labels)

    async with working(device, 500, 40, 40, 70, metrics=metrics) as batcher:
        now = asyncio.get_running_loop().time()  # so that no bulk text is overdue
        batcher.put([Item(4, 30, "bulk", now)])
        await wait_until(lambda: device.started == [[0]], within=10)
        device.ends[0].set_result(None)
        await wait_until(lambda: device.started == [[0], [1, 2], [3, 4]], within=10)
        await settled()
        assert (sample("batch_tokens_sum"), sample("batch_tokens_count")) == (500 + 80 + 100, 3)
        assert (sample("batch_items_sum"), sample("batch_items_count")) == (1 + 2 + 2, 3)
        assert sample("batch_fill_ratio_sum") == pytest.approx(1.0 + 0.8 + 1.0)
        batcher.put([Item(5, 200), Item(6, 50), Item(7, 60, "bulk", now)])
        device.ends[1].set_result(None)
        await wait_until(lambda: len(device.started) == 4, within=10)
        assert device.started[3] == [5]
        assert sample("waiting_tokens", lane="interactive") == 50
        assert sample("waiting_tokens", lane="bulk") == 60
