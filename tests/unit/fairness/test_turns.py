"""One at a time, in fair order."""

from __future__ import annotations

import asyncio

from embedq_consumer.fairness import Turns, TurnsByPlace
from tests.helpers.support import wait_until


class Visits:
    def __init__(self) -> None:
        self.turns = Turns()
        self.order: list[str] = []
        self.inside = 0
        self.gate = asyncio.Event()

    async def visit(self, client: str, cost: int = 1) -> None:
        async with self.turns.turn(client, cost):
            assert self.inside == 0
            self.inside += 1
            await self.gate.wait()
            self.order.append(client)
            self.inside -= 1


async def test_one_is_inside_at_a_time_and_a_client_that_comes_waits_for_a_turn_of_the_others() -> None:
    visits = Visits()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(visits.visit("flood", 1 << 20))
        await asyncio.sleep(0)
        tasks.create_task(visits.visit("new", 1 << 20))
        await asyncio.sleep(0)
        visits.gate.set()
    assert visits.order.index("new") <= 2
    assert len(visits.order) == 9


async def test_one_that_is_cancelled_while_it_waits_lets_the_next_in() -> None:
    visits = Visits()
    tasks = [asyncio.create_task(visits.visit(name)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    visits.gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert visits.order == ["a", "c"]


async def test_one_that_is_cancelled_as_it_is_let_in_lets_the_next_in() -> None:
    visits = Visits()
    tasks = [asyncio.create_task(visits.visit(name)) for name in "abc"]
    await asyncio.sleep(0)
    visits.gate.set()
    await wait_until(lambda: bool(visits.order), what="the first visit")
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert visits.order[-1] == "c"
    async with visits.turns.turn("d", 1):
        pass


async def test_each_place_has_its_own_turns_which_are_forgotten_when_nobody_wants_it() -> None:
    turns = TurnsByPlace(2)
    gate = asyncio.Event()
    inside: list[str] = []

    async def visit(place: str) -> None:
        async with turns.turn(place, "client", 1):
            inside.append(place)
            await gate.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(visit("a"))
        tasks.create_task(visit("b"))
        await wait_until(lambda: sorted(inside) == ["a", "a", "b"], what="two of one and one of the other")
        gate.set()
    assert sorted(inside) == ["a", "a", "a", "b"]
    assert not turns._turns
