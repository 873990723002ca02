"""How long a client's job waits for the device beside another one's flood, with plain numbers as time.

`BatchPolicy` and `PrefetchLimit` decide as in the service. A device takes a fixed part and its tokens' time for a micro-batch, a tenth
more or less; the event loop notices what has happened up to `LAG_S` later, as it does between results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from embedq_consumer.batching.batcher import BatchPolicy
from embedq_consumer.batching.prefetch import QUICK_S, PrefetchLimit, UnderWay
from embedq_shared.topics import Lane

BUDGET = 1000
OVERHEAD_S = 0.004
PACE_S = 0.0002
MICRO_BATCH_S = 1.1 * (OVERHEAD_S + BUDGET * PACE_S)
"""The longest."""
LAG_S = 0.6 * QUICK_S


@dataclass(frozen=True)
class Item:
    cost: int
    client: bytes
    job: int
    arrived: float
    lane: Lane = "interactive"


@dataclass
class Run:
    """What came of it: the seconds from each arrival of the others to its vector, and those in which the device stood still while texts
    waited."""

    took: list[float] = field(default_factory=list)
    stood_still_s: float = 0.0
    seconds: float = 0.0

    @property
    def p99(self) -> float:
        return sorted(self.took)[len(self.took) * 99 // 100]


Flood = Callable[[Random, int], list[tuple[int, int]]]
"""More of a flood: the job and the tokens of each text, about as many micro-batches as asked for."""


def short_jobs(random: Random, micro_batches: int) -> list[tuple[int, int]]:
    return [
        (random.randrange(1, 1 << 60), random.randint(15, 30)) for _ in range(micro_batches * BUDGET // 22)
    ]


def one_large_job(random: Random, micro_batches: int) -> list[tuple[int, int]]:
    return [(1, random.randint(15, 30)) for _ in range(micro_batches * BUDGET // 22)]


def books(random: Random, micro_batches: int) -> list[tuple[int, int]]:
    return [(random.randint(1, 5), 250) for _ in range(micro_batches * BUDGET // 250)]


def nothing(random: Random, micro_batches: int) -> list[tuple[int, int]]:
    return []


def run(flood: Flood, *, late: bool, others: int = 1, tokens: int = 20, calls: int = 150) -> Run:
    """Clients with one text at a time beside a flood: the next one comes when the last is answered, at once or a little later."""
    random, order = Random(7), count()
    waiting = BatchPolicy[Item](max_tokens=BUDGET, max_items=1000, max_wait=0.0, bulk_max_wait=5.0)
    prefetch, found = PrefetchLimit(late=late), Run()
    events: list[tuple[float, int, Callable[[], None]]] = []
    now = free_at = 0.0

    def at(when: float, what: Callable[[], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    def come(client: int) -> None:
        waiting.put([Item(tokens, b"%d" % client, -next(order), now)])

    def form() -> None:
        nonlocal free_at
        if waiting.waiting_tokens() < 3 * BUDGET:
            more = flood(random, 3)
            waiting.put([Item(cost, b"flood", job, now) for job, cost in more])
        while not (pause := prefetch.due_in(now)):
            waiting.idle = prefetch.idle
            batch = waiting.take(now)
            if not batch:
                return
            size = sum(item.cost for item in batch)
            one = prefetch.begin(now, size, long=False)
            if flood is not nothing:
                found.stood_still_s += max(0.0, now - free_at)
            seconds = random.uniform(0.9, 1.1) * (OVERHEAD_S + size * PACE_S)
            free_at = max(now, free_at) + seconds

            def end(
                end_at: float = free_at,
                batch: list[Item] = batch,
                one: UnderWay = one,
                seconds: float = seconds,
            ) -> None:
                prefetch.end(one, now, seconds)
                for item in batch:
                    if item.client != b"flood":
                        found.took.append(end_at - item.arrived)
                        again = now + random.choice([0.0, 0.01, random.uniform(0.0, 1.0)])
                        at(again, lambda client=int(item.client): come(client))  # type: ignore[misc]

            at(free_at + random.uniform(0.0, LAG_S), end)
        if math.isfinite(pause):
            at(now + pause + random.uniform(0.0, LAG_S), lambda: None)

    for client in range(others):
        at(1.0, lambda client=client: come(client))  # type: ignore[misc]
    form()
    while len(found.took) < calls:
        now, _, what = heapq.heappop(events)
        what()
        form()
    found.seconds = now
    return found


@pytest.mark.parametrize("flood", [short_jobs, one_large_job, books])
@pytest.mark.parametrize("late", [True, False], ids=["on a CPU", "on a GPU"])
def test_a_newcomers_job_behind_a_flood_is_over_at_most_two_micro_batches_later_than_alone(
    flood: Flood, *, late: bool
) -> None:
    alone, beside = run(nothing, late=late), run(flood, late=late)
    assert beside.p99 <= alone.p99 + 2 * MICRO_BATCH_S


@pytest.mark.parametrize("flood", [short_jobs, one_large_job, books])
def test_on_a_cpu_it_waits_for_what_runs_and_hardly_more(flood: Flood) -> None:
    alone, beside = run(nothing, late=True), run(flood, late=True)
    assert max(beside.took) <= max(alone.took) + 1.5 * MICRO_BATCH_S
    assert sum(beside.took) / len(beside.took) <= alone.p99 + MICRO_BATCH_S


@pytest.mark.parametrize("tokens", [300, 600, 1000])
def test_on_a_cpu_that_holds_for_texts_of_any_length_up_to_the_budget(tokens: int) -> None:
    alone, beside = (run(flood, late=True, tokens=tokens, calls=60) for flood in (nothing, short_jobs))
    assert beside.p99 <= alone.p99 + 2 * MICRO_BATCH_S


@pytest.mark.parametrize("late", [True, False], ids=["on a CPU", "on a GPU"])
def test_five_newcomers_wait_no_longer_than_one(*, late: bool) -> None:
    alone, beside = run(nothing, late=late, others=5), run(short_jobs, late=late, others=5)
    assert beside.p99 <= alone.p99 + 2 * MICRO_BATCH_S


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("flood", [short_jobs, one_large_job, books])
def test_a_cpu_hardly_ever_stands_still_though_micro_batches_are_formed_late(
    flood: Flood, others: int
) -> None:
    """A five-hundredth of the time at most, and hardly longer than a GPU, for which one is always formed."""
    late, ahead = (run(flood, late=late, others=others) for late in (True, False))
    assert late.stood_still_s < 0.002 * late.seconds
    assert late.stood_still_s / late.seconds <= ahead.stood_still_s / ahead.seconds + 0.001
