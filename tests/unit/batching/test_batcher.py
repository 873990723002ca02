"""Micro-batches: the policy with plain numbers as time, and the queue that waits around it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.batching.batcher import OVERDUE_SHARE, SHORT, WINDOW, Batcher, BatchPolicy
from embedq_consumer.fairness import InteractiveTraffic
from embedq_consumer.fairness.traffic import LATELY_S
from embedq_shared.topics import LANES, Lane


@dataclass(frozen=True)
class Item:
    number: int
    cost: int
    lane: Lane = "interactive"
    arrived: float = 0.0
    client: bytes = b""
    job: int = 0


def policy(
    *,
    max_tokens: int = 100,
    max_items: int = 10,
    max_wait: float = 1.0,
    bulk_max_wait: float = 50.0,
    traffic: InteractiveTraffic | None = None,
) -> BatchPolicy[Item]:
    return BatchPolicy(
        max_tokens=max_tokens,
        max_items=max_items,
        max_wait=max_wait,
        bulk_max_wait=bulk_max_wait,
        traffic=traffic,
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


def test_a_text_that_nobody_follows_does_not_wait_while_the_device_is_idle() -> None:
    waiting = policy(max_wait=1.0)
    waiting.put(items(10, arrived=5.0), followed=True)
    waiting.idle = True
    assert waiting.due_in(5.25) == 0.75
    waiting.put([], followed=False)  # the others came to nothing
    assert numbers(waiting.take(5.25)) == [0]
    waiting.idle = False
    waiting.put(items(10, arrived=6.0))
    assert waiting.due_in(6.25) == 0.75


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


def test_what_is_left_of_the_budget_goes_to_the_longest_text_that_fits() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(60, 60, 10, 30, 20, 10))
    assert numbers(waiting.take(2.0)) == [0, 3, 2]
    assert numbers(waiting.take(2.0)) == [1, 4, 5]


def test_texts_run_in_their_order_where_they_leave_no_room() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(50, 30, 20, 90, 10))
    assert numbers(waiting.take(2.0)) == [0, 1, 2]
    assert numbers(waiting.take(2.0)) == [3, 4]


def test_a_text_is_overtaken_by_none_that_arrived_a_window_later() -> None:
    waiting = policy(max_tokens=100, max_items=1000)
    waiting.put(items(60, 60, *[100] * (WINDOW - 1), 40))
    assert numbers(waiting.take(2.0)) == [0]
    assert numbers(waiting.take(2.0)) == [
        1,
        WINDOW + 1,
    ]  # which is near enough to those that it overtakes now


def test_a_text_over_the_budget_runs_alone() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(500))
    assert numbers(waiting.take(0.0)) == [0]


def test_shorter_texts_run_between_two_that_are_over_the_budget() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(500, 500, 500, 60, 60, 10))
    assert [numbers(waiting.take(2.0)) for _ in range(5)] == [[0], [3, 5], [1], [4], [2]]


def test_a_text_over_the_budget_waits_for_the_micro_batch_of_those_before_it() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(60, 500, 30, 20))
    assert [numbers(waiting.take(2.0)) for _ in range(3)] == [[0, 2], [1], [3]]


def test_an_overdue_bulk_text_over_the_budget_does_not_follow_an_interactive_one_while_shorter_ones_wait() -> (
    None
):
    waiting = policy(max_tokens=100, bulk_max_wait=5.0)
    waiting.put(items(*[110] * 4, lane="bulk"))
    waiting.put(items(*[500] * 40))
    waiting.put(items(*[60] * 40))
    batches = [waiting.take(6.0) for _ in range(20)]
    long = [batch[0].cost > 100 for batch in batches]
    assert not any(first and second for first, second in pairwise(long))
    assert {batch[0].lane for batch in batches if batch[0].cost > 100} == {"interactive", "bulk"}


def test_a_smaller_budget_holds_for_what_waits_too() -> None:
    waiting = policy(max_tokens=100)
    waiting.put(items(60, 60, 30, 10))
    waiting.resize(50)
    assert waiting.due_in(0.0) == 0.0
    assert [numbers(waiting.take(2.0)) for _ in range(3)] == [[0], [2, 3], [1]]
    waiting.put(items(60))
    waiting.resize(100)
    waiting.put([Item(1, 40)])
    assert numbers(waiting.take(2.0)) == [0, 1]


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


def test_many_short_bulk_texts_leave_a_micro_batch_to_interactive_ones() -> None:
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


def outcome(
    script: list[tuple[Lane, int, float, bool]], max_items: int = 5
) -> tuple[list[Item], list[list[Item]]]:
    """What was put, and the micro-batches, of a script of arrivals; the budget is 100."""
    waiting = policy(max_tokens=100, max_items=max_items, max_wait=1.0, bulk_max_wait=2.0)
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
            batches += [batch] if batch else []
    while math.isfinite(waiting.due_in(now)):
        now += waiting.due_in(now)
        batches.append(waiting.take(now))
        assert batches[-1]
    assert waiting.waiting_tokens() == 0
    return put, batches


@given(arrivals)
def test_whatever_comes_each_text_runs_once_and_within_the_budget(
    script: list[tuple[Lane, int, float, bool]],
) -> None:
    put, batches = outcome(script)
    ran = [item for batch in batches for item in batch]
    assert sorted(ran, key=lambda item: item.number) == put
    for batch in batches:
        assert len(batch) <= 5
        assert len(batch) == 1 or sum(item.cost for item in batch) <= 100


@given(
    st.lists(st.tuples(st.sampled_from(LANES), st.integers(1, 300)), max_size=40), st.sampled_from([0.0, 9.0])
)
def test_between_two_texts_over_the_budget_waiting_shorter_ones_get_a_micro_batch(
    backlog: list[tuple[Lane, int]], now: float
) -> None:
    """Those of their own lane, and interactive ones between any two; with bulk overdue and without."""
    waiting = policy(max_tokens=100, max_items=5, max_wait=0.0, bulk_max_wait=5.0)
    waiting.put(Item(number, cost, lane) for number, (lane, cost) in enumerate(backlog))
    batches = []
    while batch := waiting.take(now):
        batches.append(batch)
    for lane in LANES:
        of_lane = [batch for batch in batches if any(item.lane == lane for item in batch)]
        considered = batches if lane == "interactive" else of_lane
        for place, (first, second) in enumerate(pairwise(considered)):
            if first[0].cost > 100 and second[0].cost > 100:
                left = [item for batch in considered[place + 2 :] for item in batch if item.lane == lane]
                assert all(item.cost > 100 for item in left)
        long = [batch[0].number for batch in of_lane if batch[0].cost > 100]
        assert long == sorted(long)


@given(st.lists(st.integers(1, 100), max_size=900), st.integers(1, 12))
def test_fewer_than_a_window_overtake_a_text(costs: list[int], many: int) -> None:
    """Also where the worker asks while texts still come, `many` at a time."""
    waiting = policy(max_tokens=100, max_items=1000, max_wait=0.0)
    put, ran = items(*costs), []
    while put or waiting.waiting_tokens():
        waiting.put(put[:many])
        put = put[many:]
        ran += numbers(waiting.take(1.0))
    for place, number in enumerate(ran):
        before = ran[:place]
        assert sum(other > number for other in before) < WINDOW
        assert max(before, default=0) < number + WINDOW


def log_normal(count: int) -> list[int]:
    random = Random(0)
    return [min(2048, max(8, int(random.lognormvariate(math.log(180), 0.9)))) for _ in range(count)]


@pytest.mark.parametrize("max_tokens", [2048, 8192, 16384])
def test_a_backlog_of_log_normal_documents_fills_its_micro_batches(max_tokens: int) -> None:
    waiting = policy(max_tokens=max_tokens, max_items=1024)
    waiting.put(items(*log_normal(3000)))
    fills = []
    while waiting.waiting_tokens() >= 2 * max_tokens:
        fills.append(sum(item.cost for item in waiting.take(0.0)) / max_tokens)
    assert sum(fills) / len(fills) >= 0.99


def test_a_short_text_waits_for_what_arrived_before_it_and_at_most_one_long_one() -> None:
    """Simulated: a micro-batch takes its tokens' time, long texts keep coming, and now and then a short one does.

    The batch loop prefetches one micro-batch, but none after a text over the budget.
    """
    waiting = policy(max_tokens=100, max_wait=0.0)
    random = Random(1)
    long = 800
    now, number, worst = 0.0, 0, 0.0
    under_way: deque[tuple[float, list[Item]]] = deque()  # (when it ends, what it is)
    free_at = 0.0
    for _ in range(20_000):
        while waiting.waiting_tokens() < 3 * long:
            number += 1
            waiting.put([Item(number, long, "interactive", now)])
        if random.random() < 0.2:
            number += 1
            waiting.put([Item(number, 30, "interactive", now)])
        alone = any(batch[0].cost > 100 for _, batch in under_way)
        if len(under_way) < 2 and not alone:
            batch = waiting.take(now)
            free_at = max(now, free_at) + sum(item.cost for item in batch)
            under_way.append((free_at, batch))
            continue
        end, batch = under_way.popleft()
        now = end
        worst = max([worst, *(end - item.arrived for item in batch if item.cost < 100)])
    # One long text; the micro-batch that was under way before it, and its own.
    assert long < worst <= long + 2 * 100


# -- clients and jobs take turns ------------------------------------------------------------------------------------------


def flood(count: int, cost: int, client: bytes = b"flood", *, job: int = 0, first: int = 0) -> list[Item]:
    """Texts of one client, each a job of its own unless `job` is given."""
    return [
        Item(first + number, cost, client=client, job=job or 1_000_000 + first + number)
        for number in range(count)
    ]


@pytest.mark.parametrize("cost", [1, 7, 40, 100])
def test_a_client_that_comes_is_in_the_next_micro_batch_however_much_another_has_queued(cost: int) -> None:
    waiting = policy(max_tokens=800, max_items=100_000)
    waiting.put(flood(6000, cost))
    for _ in range(3):
        waiting.take(2.0)
    waiting.put([Item(0, 100, client=b"new")])
    assert b"new" in {item.client for item in waiting.take(2.0)}


def test_beside_a_backlog_a_text_of_another_client_runs_apart_from_it() -> None:
    waiting = policy(max_tokens=800, max_items=1000)
    waiting.put(flood(6000, 40))
    waiting.take(2.0)
    waiting.put([Item(0, 100, client=b"new"), Item(1, 50, client=b"newer")])
    assert numbers(waiting.take(2.0)) == [0, 1]
    assert {item.client for item in waiting.take(2.0)} == {b"flood"}


def test_what_waits_of_a_client_and_would_fill_no_micro_batch_is_no_backlog() -> None:
    waiting = policy(max_tokens=800, max_items=1000)
    waiting.put(flood(20, 40))
    waiting.put([Item(100, 10, client=b"new")])
    assert {item.client for item in waiting.take(2.0)} == {b"flood", b"new"}


def test_those_who_come_run_apart_from_a_backlog_in_a_quarter_of_what_runs() -> None:
    waiting = policy(max_tokens=800, max_items=1000)
    waiting.put(flood(6000, 40))
    used = Counter[bytes]()
    since = 0
    for number in range(200):
        waiting.put([Item(number, 60, client=b"new", job=number)])
        batch = waiting.take(2.0)
        since = 0 if b"flood" in {item.client for item in batch} else since + 1
        assert since <= 2, "at most two small micro-batches between two of the backlog"
        for item in batch:
            used[item.client] += item.cost
    assert used[b"new"] >= 190 * 60, "whoever comes is answered all the same"
    assert used[b"flood"] > 200 / 3 * 800 * 0.85


def test_a_text_over_the_budget_does_not_count_as_one_that_ran_apart() -> None:
    waiting = policy(max_tokens=100, max_items=1000)
    waiting.put(flood(3, 500, b"long"))
    waiting.put(flood(300, 10, first=3))
    waiting.put([Item(1000, 10, client=b"new")])
    assert [item.cost for item in waiting.take(2.0)] == [500]
    assert numbers(waiting.take(2.0)) == [1000]


def test_a_short_text_behind_a_book_of_its_own_client_is_in_the_next_micro_batch() -> None:
    waiting = policy(max_tokens=800, max_items=1000)
    waiting.put(flood(400, 100, job=1))
    waiting.take(2.0)
    waiting.put([Item(7, 20, client=b"flood", job=2)])
    assert 2 in {item.job for item in waiting.take(2.0)}


def test_a_book_goes_on_while_short_texts_of_its_client_come_without_end() -> None:
    waiting = policy(max_tokens=800, max_items=1000)
    waiting.put(flood(100, 100, job=1))
    ran = 0
    for number in range(200):
        waiting.put(flood(16, 50, first=16 * number))  # as much as a micro-batch holds
        ran += sum(item.job == 1 for item in waiting.take(2.0))
    assert ran >= 20


def test_a_text_over_the_budget_costs_its_client_the_turns_that_it_takes() -> None:
    waiting = policy(max_tokens=100, max_items=1000)
    waiting.put(flood(50, 500, b"long"))
    waiting.put(flood(5000, 10, b"short", first=50))
    used = {b"long": 0, b"short": 0}
    for _ in range(60):
        for item in waiting.take(2.0):
            used[item.client] += item.cost
    assert abs(used[b"long"] - used[b"short"]) <= 1.25 * 100 + 500


@given(
    st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=6), min_size=2, max_size=5),
    st.integers(1, 25),
)
@settings(max_examples=30, deadline=None)
def test_of_two_clients_that_wait_neither_runs_much_more_than_the_other(
    costs: list[list[int]], batches: int
) -> None:
    """Fair shares, also with best fit: 1.25 micro-batches and two texts apart at most."""
    waiting = policy(max_tokens=400, max_items=1000)
    used = dict.fromkeys(range(len(costs)), 0)
    number = 0
    for client, each in enumerate(costs):
        for at in range(batches * 400 // min(each) // len(each) + 300):
            for cost in each:
                waiting.put([Item(number, cost, client=b"%d" % client, job=at)])
                number += 1
    for _ in range(batches):
        batch = waiting.take(2.0)
        assert sum(item.cost for item in batch) > 400 - 100  # nothing is held back for the sake of fairness
        for item in batch:
            used[int(item.client)] += item.cost
        assert max(used.values()) - min(used.values()) <= 1.25 * 400 + 2 * 100


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(1, 130)), max_size=200),
    st.integers(1, 9),
)
def test_whoever_comes_each_text_runs_once_and_few_are_picked_past_one_of_its_job(
    script: list[tuple[str, int, int]], many: int
) -> None:
    waiting = policy(max_tokens=100, max_items=7, max_wait=0.0)
    put = [
        Item(number, cost, client=client.encode(), job=ord(client) * 10 + job)
        for number, (client, job, cost) in enumerate(script)
    ]
    ran: list[Item] = []
    left = list(put)
    while left or waiting.waiting_tokens():
        waiting.put(left[:many])
        left = left[many:]
        batch = waiting.take(1.0)
        assert batch
        assert len(batch) <= 7
        assert len(batch) == 1 or sum(item.cost for item in batch) <= 100
        ran += batch
    assert sorted(item.number for item in ran) == list(range(len(put)))
    assert waiting.due_in(1.0) == math.inf


def test_a_text_may_be_picked_past_only_so_often() -> None:
    """A text that fits the end of no micro-batch is overtaken by fewer than a window's worth, also by later arrivals."""
    waiting = policy(max_tokens=100, max_items=1000, max_wait=0.0)
    waiting.put([Item(0, 60, job=1)])
    overtook, number = 0, 1
    for _ in range(200):
        # The front is always one that leaves 40: room for four small ones, and none for the text behind it.
        waiting.put(
            [
                Item(number, 61, job=2 + number),
                *(Item(number + n, 9, job=2 + number + n) for n in range(1, 5)),
            ]
        )
        number += 5
        batch = waiting.take(1.0)
        if any(item.number == 0 for item in batch):
            break
        overtook += len(batch)
    assert overtook < WINDOW


class Simulated:
    """A lane whose micro-batches take their tokens' time, with one prefetched; texts of one client come now and then.

    `waits` are theirs, each until its micro-batch begins, `took` until it ends.
    """

    def __init__(self, backlog: list[Item], *, seconds: int = 45_000) -> None:
        waiting = policy(max_tokens=400, max_items=1000, max_wait=0.0)
        waiting.put(backlog)
        random = Random(3)
        now, number, free_at = 0.0, 10_000_000, 0.0
        due = 100.0
        under_way: deque[tuple[float, list[Item]]] = deque()
        self.waits: list[float] = []
        self.took: list[float] = []
        while now < seconds:
            while due <= now:
                waiting.put([Item(number, 40, arrived=due, client=b"victim", job=number)])
                number += 1
                due += random.uniform(500, 900)
            if len(under_way) < 2 and (batch := waiting.take(now)):
                free_at = max(now, free_at) + sum(item.cost for item in batch)
                under_way.append((free_at, batch))
                continue
            if not under_way:
                now = due
                continue
            now, batch = under_way.popleft()
            began = now - sum(item.cost for item in batch)
            theirs = [item for item in batch if item.number >= 10_000_000]
            self.waits += [began - item.arrived for item in theirs]
            self.took += [now - item.arrived for item in theirs]


def p99(waits: list[float]) -> float:
    return sorted(waits)[len(waits) * 99 // 100]


@pytest.mark.parametrize(
    "backlog",
    [
        flood(20_000, 40),
        flood(4_000, 40, job=1),
        [*flood(9_000, 40), *flood(2_000, 400, job=1, first=9_000)],
        flood(5_000, 100, b"victim", job=1),
    ],
    ids=["many jobs", "a large job", "jobs and a book", "its own book"],
)
def test_a_flood_moves_another_clients_p99_by_at_most_two_micro_batches(backlog: list[Item]) -> None:
    alone, beside = Simulated([]), Simulated(backlog)
    assert len(beside.waits) > 50
    assert p99(beside.waits) <= p99(alone.waits) + 2 * 400
    if backlog[0].client != b"victim":  # whose micro-batch its own book fills
        assert p99(beside.took) <= p99(alone.took) + 2 * 400


async def test_the_queue_hands_out_a_batch_when_its_wait_is_over() -> None:
    batcher = Batcher[Item](policy(max_wait=0.01))
    now = asyncio.get_running_loop().time()
    batcher.put([Item(0, 1, arrived=now)])
    assert numbers(await batcher.next()) == [0]
    assert asyncio.get_running_loop().time() >= now + 0.01


async def test_an_arrival_wakes_the_loop_that_waits_for_a_batch() -> None:
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


# -- bulk beside interactive texts ----------------------------------------------------------------------------------------


def beside(now: float = 0.0) -> InteractiveTraffic:
    """An interactive text came now."""
    traffic = InteractiveTraffic()
    traffic.note(now)
    return traffic


def test_bulk_runs_in_quarters_of_a_micro_batch_while_interactive_texts_come_and_whole_ones_afterwards() -> (
    None
):
    waiting = policy(max_tokens=400, max_items=1000, traffic=beside(0.0))
    waiting.put(items(*[10] * 500, lane="bulk"))
    assert sum(item.cost for item in waiting.take(2.0)) == 400 // SHORT
    assert sum(item.cost for item in waiting.take(LATELY_S - 0.1)) == 400 // SHORT
    assert sum(item.cost for item in waiting.take(LATELY_S)) == 400


def test_an_interactive_texts_own_micro_batch_is_filled_to_a_quarter() -> None:
    waiting = policy(max_tokens=400, max_items=1000, traffic=beside())
    waiting.put(items(*[10] * 500, lane="bulk"))
    waiting.put([Item(1000, 30)])
    batch = waiting.take(2.0)
    assert batch[0].number == 1000
    assert sum(item.cost for item in batch) == 400 // SHORT
    waiting.put(items(*[50] * 6))  # more than a quarter: nothing of bulk runs with them
    assert {item.lane for item in waiting.take(2.0)} == {"interactive"}


def test_a_quarter_of_the_texts_are_bulk_ones_however_short_they_are() -> None:
    waiting = policy(max_tokens=10_000, max_items=80, traffic=beside())
    waiting.put(items(*[1] * 500, lane="bulk"))
    assert len(waiting.take(2.0)) == 80 // SHORT


def test_a_bulk_text_longer_than_a_quarter_runs_without_others_and_is_not_starved() -> None:
    traffic = beside()
    waiting = policy(max_tokens=400, max_items=1000, traffic=traffic)
    waiting.put(items(300, 10, 500, 120, 10, lane="bulk"))
    assert [numbers(waiting.take(2.0)) for _ in range(4)] == [[0], [1, 4], [2], [3]]


def test_interactive_texts_alone_have_whole_micro_batches() -> None:
    waiting = policy(max_tokens=400, max_items=1000, traffic=beside())
    waiting.put(items(*[40] * 10))
    assert len(waiting.take(2.0)) == 10


@given(arrivals)
def test_whatever_comes_each_text_runs_once_also_while_bulk_runs_in_quarters(
    script: list[tuple[Lane, int, float, bool]],
) -> None:
    traffic, now, put, batches = InteractiveTraffic(), 0.0, [], []
    waiting = policy(max_tokens=100, max_items=8, bulk_max_wait=2.0, traffic=traffic)
    for number, (lane, tokens, pause, worker_asks) in enumerate(script):
        now += pause
        if lane == "interactive":
            traffic.note(now)
        put.append(Item(number, tokens, lane, now))
        waiting.put(put[-1:])
        if worker_asks and (batch := waiting.take(now)):
            batches.append(batch)
    while math.isfinite(waiting.due_in(now)):
        now += waiting.due_in(now)
        batches.append(waiting.take(now))
        assert batches[-1]
    assert sorted(item.number for batch in batches for item in batch) == list(range(len(put)))
    for batch in batches:
        assert len(batch) == 1 or sum(item.cost for item in batch) <= 100


class Backlog:
    """Interactive texts of 8 tokens now and then beside a bulk backlog that never ends, on a device with up to `under_way`
    micro-batches given to it. A micro-batch takes its tokens' time. `waits`: from a text's arrival to its vector."""

    def __init__(self, *, under_way: int, bulk: int, pause: float, backlog: bool = True) -> None:
        traffic = InteractiveTraffic()
        waiting = policy(max_tokens=400, max_items=1000, max_wait=0.0, bulk_max_wait=1e9, traffic=traffic)
        random = Random(5)
        self.waits: list[float] = []
        self.ran = 0.0
        now, free_at, due, number = 0.0, 0.0, 3.0, 0
        ends: deque[tuple[float, list[Item]]] = deque()
        while len(self.waits) < 300:
            while due <= now:
                traffic.note(due)
                waiting.put([Item(-1, 8, arrived=due)])
                due += random.uniform(0.5, 1.5) * pause
            while backlog and waiting.waiting_tokens("bulk") < 2000:
                number += 1
                waiting.put([Item(number, bulk, "bulk", now, job=number)])
            if len(ends) < under_way and (batch := waiting.take(now)):
                tokens = sum(item.cost for item in batch)
                self.ran += tokens
                free_at = max(now, free_at) + tokens / 400  # seconds: a whole micro-batch takes one
                ends.append((free_at, batch))
            elif ends and (ends[0][0] <= due or len(ends) == under_way):
                now, batch = ends.popleft()
                self.waits += [now - item.arrived for item in batch if item.number < 0]
            else:
                now = due
        self.busy = self.ran / 400 / now

    @property
    def p99(self) -> float:
        return sorted(self.waits)[len(self.waits) * 99 // 100]


@pytest.mark.parametrize("under_way", [2, 3])
@pytest.mark.parametrize(("pause", "bulk"), [(1.7, 5), (1.7, 40), (1.7, 100), (LATELY_S / 2, 100)])
def test_a_bulk_backlog_moves_interactive_p99_by_one_micro_batch_at_most(
    under_way: int, pause: float, bulk: int
) -> None:
    """However long the backlog is, with two micro-batches under way and with three, for whoever comes often enough."""
    alone = Backlog(under_way=under_way, bulk=bulk, pause=pause, backlog=False)
    beside = Backlog(under_way=under_way, bulk=bulk, pause=pause)
    assert beside.p99 <= alone.p99 + 1.0
    assert beside.busy > 0.99, "and the device is busy with bulk all the time"
