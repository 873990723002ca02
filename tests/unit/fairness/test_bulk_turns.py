"""Bulk work on the event loop has one turn in a round of it while interactive work comes, and none of that otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from embedq_consumer.fairness import BulkTurns, InteractiveTraffic
from embedq_consumer.fairness.traffic import LATELY_S


def busy() -> BulkTurns:
    """Turns beside an interactive job that came a moment ago."""
    traffic = InteractiveTraffic()
    traffic.note(100.0)
    return BulkTurns(traffic, clock=lambda: 100.5)


async def rounds_of(done: Callable[[], bool]) -> int:
    """How many rounds the event loop makes until then."""
    rounds = 0
    while not done():
        rounds += 1
        await asyncio.sleep(0)
    return rounds


def test_interactive_work_is_lately_there_for_a_while_after_it_came() -> None:
    traffic = InteractiveTraffic()
    assert not traffic.lately(0.0)
    traffic.note(5.0)
    assert traffic.lately(5.0 + LATELY_S - 0.1)
    assert not traffic.lately(5.0 + LATELY_S)


async def test_without_interactive_work_nothing_waits() -> None:
    turns = BulkTurns(InteractiveTraffic())
    assert not turns.needed
    ran: list[int] = []

    async def piece(number: int) -> None:
        await turns.turn()
        ran.append(number)

    tasks = [asyncio.create_task(piece(number)) for number in range(20)]
    await asyncio.sleep(0)
    assert ran == list(range(20)), "all in the round in which they began"
    await asyncio.gather(*tasks)


async def test_beside_interactive_work_pieces_run_in_order_and_one_in_a_round() -> None:
    turns = busy()
    ran: list[int] = []
    most = 0

    async def piece(number: int) -> None:
        await turns.turn()
        ran.append(number)

    tasks = [asyncio.create_task(piece(number)) for number in range(20)]
    while len(ran) < 20:
        before = len(ran)
        await asyncio.sleep(0)
        most = max(most, len(ran) - before)
    assert ran == list(range(20))
    assert most == 1
    await asyncio.gather(*tasks)
    assert turns.needed


async def test_an_interactive_step_waits_for_one_piece_at_most() -> None:
    turns = busy()
    ran: list[int] = []
    for number in range(100):
        turns.soon(lambda number=number: ran.append(number))  # type: ignore[misc]
    hops = 20
    for _ in range(hops):  # each a step of an interactive job, ready at once
        await asyncio.sleep(0)
    assert len(ran) <= hops + 1


async def test_pieces_that_wait_when_interactive_work_ends_still_run() -> None:
    now = 100.0
    traffic = InteractiveTraffic()
    traffic.note(now)
    turns = BulkTurns(traffic, clock=lambda: now)
    ran: list[int] = []
    for number in range(3):
        turns.soon(lambda number=number: ran.append(number))  # type: ignore[misc]
    now += 2 * LATELY_S
    assert turns.needed, "whoever comes goes behind those that wait"
    await rounds_of(lambda: len(ran) == 3)
    await asyncio.sleep(0)
    assert not turns.needed


async def test_a_piece_that_is_cancelled_or_fails_costs_the_others_nothing() -> None:
    turns = busy()
    ran: list[str] = []

    async def piece(name: str) -> None:
        await turns.turn()
        ran.append(name)

    async def fails() -> None:
        await turns.turn()
        raise RuntimeError("its own fault")

    first = asyncio.create_task(piece("first"))
    broken = asyncio.create_task(fails())
    last = asyncio.create_task(piece("last"))
    await asyncio.sleep(0)
    first.cancel()
    found = await asyncio.gather(first, broken, last, return_exceptions=True)
    assert [type(one) for one in found] == [asyncio.CancelledError, RuntimeError, type(None)]
    assert ran == ["last"]
