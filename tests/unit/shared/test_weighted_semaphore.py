"""Work is admitted by weight, in order, and never starved."""

from __future__ import annotations

import asyncio

import pytest

from embedq_shared.weighted_semaphore import WeightedSemaphore


async def test_work_is_admitted_in_the_order_of_asking() -> None:
    semaphore = WeightedSemaphore(10, 100)
    assert semaphore.try_acquire(8, 10)
    large = asyncio.ensure_future(semaphore.acquire(5, 10))
    await asyncio.sleep(0)

    assert not semaphore.try_acquire(1, 1), "a small one must not overtake"
    semaphore.release(8, 10)
    await large

    assert semaphore.held == (5, 10)


async def test_one_that_is_too_large_runs_alone_instead_of_never() -> None:
    semaphore = WeightedSemaphore(2, 10)

    assert semaphore.try_acquire(5, 500)
    assert not semaphore.try_acquire(1, 1)
    semaphore.release(5, 500)
    assert semaphore.try_acquire(1, 1)


async def test_someone_who_stops_waiting_holds_nobody_up() -> None:
    semaphore = WeightedSemaphore(1, 10)
    semaphore.try_acquire(1, 1)
    impatient = asyncio.ensure_future(semaphore.acquire(1, 1))
    patient = asyncio.ensure_future(semaphore.acquire(1, 1))
    await asyncio.sleep(0)

    impatient.cancel()
    semaphore.release(1, 1)
    await patient

    assert semaphore.held == (1, 1)
    semaphore.release(1, 1)
    assert semaphore.try_acquire(1, 1)


async def test_what_was_granted_to_someone_who_was_cancelled_meanwhile_comes_back() -> None:
    semaphore = WeightedSemaphore(1, 10)
    semaphore.try_acquire(1, 1)
    waiting = asyncio.ensure_future(semaphore.acquire(1, 1))
    await asyncio.sleep(0)

    semaphore.release(1, 1)  # grants it
    waiting.cancel()  # before it runs
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert semaphore.held == (0, 0)


def test_releasing_more_than_was_acquired_is_a_bug() -> None:
    semaphore = WeightedSemaphore(10)
    assert semaphore.try_acquire(3)

    with pytest.raises(RuntimeError, match="This is a bug"):
        semaphore.release(4)


async def test_what_was_acquired_in_one_piece_may_be_released_in_several() -> None:
    semaphore = WeightedSemaphore(10)
    assert semaphore.try_acquire(10)
    waiting = asyncio.ensure_future(semaphore.acquire(6))
    await asyncio.sleep(0)

    semaphore.release(5)
    await asyncio.sleep(0)
    assert not waiting.done()
    semaphore.release(5)
    await waiting

    assert semaphore.held == (6,)
