"""Micro-batches: the policy with plain numbers as time, and the queue that waits around it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.batching import LANES, OVERDUE_SHARE, Batcher, BatchPolicy, Lane


@dataclass(frozen=True)
class Item:
    number: int
    cost: int
    lane: Lane = "interactive"
    arrived: float = 0.0


def policy(
    *, max_tokens: int = 100, max_items: int = 10, max_wait: float = 1.0, bulk_max_wait: float = 50.0
) -> BatchPolicy[Item]:
    return BatchPolicy(
        max_tokens=max_tokens, max_items=max_items, max_wait=max_wait, bulk_max_wait=bulk_max_wait
    )


def items(*tokens: int, lane: Lane = "interactive", arrived: float = 0.0) -> list[Item]:
    return [Item(number, count, lane, arrived) for number, count in enumerate(tokens)]


def numbers(batch: Sequence[Item]) -> list[int]:
    return [item.number for item in batch]


def test_nothing_is_due_while_nothing_waits() -> None:
    waiting = policy()
    assert waiting.due_in(0.0) == math.inf
    assert waiting.take(1e9) == []


def test_a_lone_text_waits_for_others_as_long_as_allowed_and_no_longer() -> None:
    waiting = policy(max_wait=1.0)
    waiting.put(items(10, arrived=5.0))
    assert waiting.due_in(5.25) == 0.75
    assert waiting.take(5.99) == []
    assert numbers(waiting.take(6.0)) == [0]
    assert waiting.due_in(6.0) == math.inf


def test_the_wait_is_counted_from_the_oldest_text_of_both_lanes() -> None:
    waiting = policy(max_wait=1.0)
    waiting.put(items(10, arrived=5.0, lane="bulk"))
    waiting.put(items(10, arrived=5.9))
    assert waiting.due_in(5.9) == pytest.approx(0.1)


def test_a_full_token_budget_runs_at_once() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(60, 39))
    assert waiting.due_in(0.0) > 0
    waiting.put([Item(2, 1)])
    assert waiting.due_in(0.0) == 0
    assert numbers(waiting.take(0.0)) == [0, 1, 2]


def test_as_many_texts_as_allowed_run_at_once() -> None:
    waiting = policy(max_items=3)
    waiting.put(items(1, 1, 1, 1))
    assert numbers(waiting.take(0.0)) == [0, 1, 2]
    assert waiting.take(0.0) == []


def test_a_text_that_does_not_fit_waits_for_the_next_one_and_nothing_overtakes_it() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(60, 60, 10))
    assert numbers(waiting.take(2.0)) == [0]
    assert numbers(waiting.take(2.0)) == [1, 2]


def test_a_text_over_the_budget_runs_alone() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(10, 500, 10))
    assert [numbers(waiting.take(2.0)) for _ in range(3)] == [[0], [1], [2]]


def test_interactive_texts_go_first_and_bulk_ones_fill_the_rest() -> None:
    waiting = policy(max_tokens=100)
    waiting.put([Item(0, 40, "bulk"), Item(1, 40, "bulk"), Item(2, 50, "interactive")])
    assert numbers(waiting.take(2.0)) == [2, 0]
    assert numbers(waiting.take(2.0)) == [1]


def saturated(bulk_tokens: int, interactive_tokens: int, batches: int = 400) -> dict[Lane, float]:
    """Shares of the tokens that each lane gets while both lanes always have texts waiting, the bulk ones overdue."""
    waiting = policy(max_tokens=100, max_items=1000, bulk_max_wait=5.0)
    done: dict[Lane, int] = dict.fromkeys(LANES, 0)
    for number in range(batches):
        # More of each than one micro-batch takes, so that neither lane ever runs dry.
        for lane, tokens in (("bulk", bulk_tokens), ("interactive", interactive_tokens)):
            while waiting.waiting_tokens(lane) < 3 * max(100, tokens):  # type: ignore[arg-type]
                waiting.put([Item(number, tokens, lane, 0.0)])  # type: ignore[arg-type]
        batch = waiting.take(1000.0)
        assert batch
        for item in batch:
            done[item.lane] += item.cost
    return {lane: count / sum(done.values()) for lane, count in done.items()}


@pytest.mark.parametrize("interactive_tokens", [1, 20, 60, 100, 400])
@pytest.mark.parametrize("bulk_tokens", [1, 20, 60, 100, 400])
def test_neither_lane_starves_the_other(bulk_tokens: int, interactive_tokens: int) -> None:
    """Overdue bulk texts get about a quarter of the micro-batches' room, however long the texts of either lane are."""
    shares = saturated(bulk_tokens, interactive_tokens)
    assert shares["bulk"] >= 1 / 25  # an interactive text over the budget takes as much room as it needs
    assert shares["interactive"] >= 1 / 2


def test_many_short_bulk_texts_do_not_use_up_the_places_of_interactive_ones() -> None:
    waiting = policy(max_tokens=10_000, max_items=8, bulk_max_wait=5.0)
    waiting.put(items(*[1] * 20, lane="bulk"))
    waiting.put(items(*[1] * 20))
    assert [item.lane for item in waiting.take(6.0)] == ["bulk"] * 2 + ["interactive"] * 6


def test_bulk_texts_that_are_not_overdue_wait_for_every_interactive_one() -> None:
    waiting = policy(max_tokens=100, bulk_max_wait=5.0)
    waiting.put(items(10, lane="bulk", arrived=8.0))
    for _ in range(5):
        waiting.put(items(100, arrived=9.0))
        assert [item.lane for item in waiting.take(10.0)] == ["interactive"]


def test_an_overdue_bulk_text_is_in_the_next_micro_batch_if_its_share_holds_it() -> None:
    waiting = policy(max_tokens=100, bulk_max_wait=5.0)
    waiting.put(items(100 // OVERDUE_SHARE, lane="bulk"))
    waiting.put(items(75, 75))
    assert [item.lane for item in waiting.take(6.0)] == ["bulk", "interactive"]


arrivals = st.lists(
    st.tuples(
        st.sampled_from(LANES),
        st.integers(0, 150),  # tokens
        st.floats(0, 3),  # seconds since the arrival before
        st.booleans(),  # whether the worker asks for a micro-batch then
    ),
    max_size=60,
)


@given(arrivals)
def test_whatever_comes_each_text_runs_once_in_its_lanes_order_and_within_the_budget(
    script: list[tuple[Lane, int, float, bool]],
) -> None:
    waiting = policy(max_tokens=100, max_items=5, max_wait=1.0, bulk_max_wait=2.0)
    now, put, batches = 0.0, [], []
    for number, (lane, tokens, pause, worker_asks) in enumerate(script):
        now += pause
        item = Item(number, tokens, lane, now)
        waiting.put([item])
        put.append(item)
        if worker_asks:
            due = waiting.due_in(now) == 0
            batch = waiting.take(now)
            assert bool(batch) is due
            batches.append(batch)
    while math.isfinite(waiting.due_in(now)):
        now += waiting.due_in(now)
        batches.append(waiting.take(now))
        assert batches[-1]
    for lane in LANES:
        ran = [item for batch in batches for item in batch if item.lane == lane]
        assert ran == [item for item in put if item.lane == lane]
        assert waiting.waiting_tokens(lane) == 0
    for batch in batches:
        assert len(batch) <= 5
        assert len(batch) <= 1 or sum(item.cost for item in batch) <= 100


async def test_the_queue_hands_out_a_batch_when_its_wait_is_over() -> None:
    batcher = Batcher[Item](policy(max_wait=0.01))
    now = asyncio.get_running_loop().time()
    batcher.put([Item(0, 1, arrived=now)])
    assert numbers(await batcher.next()) == [0]
    assert asyncio.get_running_loop().time() >= now + 0.01


async def test_an_arrival_wakes_whoever_waits_for_a_batch() -> None:
    batcher = Batcher[Item](policy(max_tokens=100, max_wait=3600.0))
    waiting = asyncio.create_task(batcher.next())
    now = asyncio.get_running_loop().time()
    batcher.put([Item(0, 60, arrived=now)])
    await asyncio.sleep(0)  # it wakes, finds nothing due for an hour, and waits on
    await asyncio.sleep(0)
    assert not waiting.done()
    batcher.put([Item(1, 60, arrived=now)])
    async with asyncio.timeout(10):
        assert numbers(await waiting) == [0]


async def test_a_cancelled_wait_takes_no_texts_with_it() -> None:
    batcher = Batcher[Item](policy(max_wait=0.0))
    waiting = asyncio.create_task(batcher.next())
    await asyncio.sleep(0)
    batcher.put([Item(0, 1)])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert batcher.waiting_tokens("interactive") == 1
    assert numbers(await batcher.next()) == [0]
