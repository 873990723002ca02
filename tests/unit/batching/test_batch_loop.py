"""The worker: how many micro-batches are under way at once, with plain numbers as time and around a real batcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from embedq_consumer.batching.batch_loop import BatchLoop, PrefetchLimit
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.topics import Lane
from tests.helpers.support import wait_until


@dataclass(frozen=True)
class Item:
    number: int
    cost: int
    lane: Lane = "interactive"
    arrived: float = 0.0


def test_one_runs_and_one_waits_behind_it() -> None:
    prefetch = PrefetchLimit()
    prefetch.begin(long=False)
    assert prefetch.allows_another()
    prefetch.begin(long=False)
    assert not prefetch.allows_another()
    prefetch.end(0.0, 0.2, long=False)
    assert prefetch.allows_another()


def test_quick_ones_may_have_two_behind_them_and_slow_ones_again_one() -> None:
    prefetch = PrefetchLimit()
    for _ in range(2):
        prefetch.begin(long=False)
    prefetch.end(0.0, 0.003, long=False)
    prefetch.begin(long=False)
    assert prefetch.allows_another()
    prefetch.begin(long=False)
    assert not prefetch.allows_another()
    prefetch.end(0.001, 0.1, long=False)  # it had the device from 0.003 on
    assert not prefetch.allows_another()
    prefetch.end(0.002, 0.2, long=False)
    assert prefetch.allows_another()


def test_waiting_behind_another_one_does_not_count_as_slow() -> None:
    prefetch = PrefetchLimit()
    for _ in range(2):
        prefetch.begin(long=False)
    prefetch.end(0.0, 1.0, long=False)
    prefetch.end(0.0, 1.003, long=False)
    for _ in range(2):
        prefetch.begin(long=False)
    assert prefetch.allows_another()


def test_nothing_is_taken_behind_a_text_over_the_budget() -> None:
    prefetch = PrefetchLimit()
    prefetch.begin(long=False)
    assert prefetch.allows_another()  # it may itself wait behind another one
    prefetch.begin(long=True)
    prefetch.end(0.0, 0.2, long=False)
    assert not prefetch.allows_another()
    prefetch.end(0.1, 1.0, long=True)
    assert prefetch.allows_another()


@dataclass
class Device:
    """Runs what it is given until it is told that one is done."""

    started: list[list[int]] = field(default_factory=list)
    ends: list[asyncio.Future[None]] = field(default_factory=list)

    async def run(self, batch: Sequence[Item]) -> None:
        self.started.append([item.number for item in batch])
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]


@asynccontextmanager
async def working(device: Device, *costs: int) -> AsyncIterator[Batcher[Item]]:
    """A worker around a budget of 100 tokens, with these texts waiting."""
    batcher = Batcher[Item](BatchPolicy(max_tokens=100, max_items=10, max_wait=0.0, bulk_max_wait=5.0))
    batcher.put(Item(number, cost) for number, cost in enumerate(costs))
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(BatchLoop(batcher, device.run, Metrics(), tasks).run())
        yield batcher
        worker.cancel()
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


async def test_a_micro_batch_that_fails_ends_the_worker() -> None:
    class Broken(Exception): ...

    async def run(batch: Sequence[Item]) -> None:
        raise Broken

    batcher = Batcher[Item](BatchPolicy(max_tokens=100, max_items=10, max_wait=0.0, bulk_max_wait=5.0))
    batcher.put([Item(0, 1)])
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(BatchLoop(batcher, run, Metrics(), tasks).run())
    assert raised.value.subgroup(Broken) is not None
