"""Whose turn it is: nobody uses more than his share, whatever things cost."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.fairness import FairQueue, Rounds

QUANTUM = 100
COSTS = st.lists(st.integers(1, 350), min_size=1, max_size=12)


def whose_turn(rounds: Rounds[str]) -> str:
    flow = rounds.turn()
    assert flow is not None
    return flow.key


def test_nobodys_turn_while_nobody_waits() -> None:
    assert Rounds[str](QUANTUM).turn() is None


def test_a_turn_lasts_until_the_quantum_is_used() -> None:
    rounds = Rounds[str](QUANTUM)
    rounds.enter("a")
    rounds.enter("b")
    turns = []
    for _ in range(8):
        turns.append(whose_turn(rounds))
        rounds.charge(turns[-1], 50)
    assert "".join(turns) == "aabbaabb"


def test_who_used_more_than_its_turn_lets_turns_pass() -> None:
    rounds = Rounds[str](QUANTUM)
    rounds.enter("large")
    rounds.enter("small")
    turns = []
    for _ in range(9):
        turns.append(whose_turn(rounds))
        rounds.charge(turns[-1], 450 if turns[-1] == "large" else 100)
    assert turns == ["large", *["small"] * 4, "large", *["small"] * 3]


def test_one_who_comes_waits_for_one_turn_of_each_other() -> None:
    rounds = Rounds[str](QUANTUM)
    for key in "abc":
        rounds.enter(key)
    rounds.charge(whose_turn(rounds), 40)
    rounds.enter("new")
    before = []
    while (key := whose_turn(rounds)) != "new":
        before.append(key)
        rounds.charge(key, 50)
    assert Counter(before) == {"a": 2, "b": 2, "c": 2}


def test_debt_is_not_forgotten_by_leaving_and_coming_back() -> None:
    rounds = Rounds[str](QUANTUM)
    for key in "ab":
        rounds.enter(key)
    assert whose_turn(rounds) == "a"
    rounds.charge("a", 1000)
    rounds.leave("a")
    rounds.enter("a")
    used = 0
    while whose_turn(rounds) == "b":
        rounds.charge("b", 50)
        used += 50
    assert used >= 800


def test_when_nobody_waits_debts_are_over() -> None:
    rounds = Rounds[str](QUANTUM)
    rounds.enter("a")
    rounds.charge("a", 1000)
    rounds.leave("a")
    rounds.enter("a")
    assert rounds.flow("a").credit == QUANTUM


def test_what_one_uses_who_waits_for_nothing_more_is_counted_too() -> None:
    rounds = Rounds[str](QUANTUM)
    for key in "ab":
        rounds.enter(key)
    rounds.leave("a")
    rounds.charge("a", 300)
    rounds.enter("a")
    assert rounds.flow("a").credit < 0


def test_who_cannot_use_its_turn_goes_to_the_end_with_its_credit() -> None:
    rounds = Rounds[str](QUANTUM)
    for key in "ab":
        rounds.enter(key)
    rounds.charge(whose_turn(rounds), 40)
    rounds.skip()
    assert whose_turn(rounds) == "b"
    assert rounds.flow("a").credit == 60


@given(st.lists(COSTS, min_size=2, max_size=6), st.integers(1, 400))
def test_of_two_who_wait_all_the_while_neither_uses_much_more(costs: list[list[int]], steps: int) -> None:
    rounds = Rounds[int](QUANTUM)
    used = dict.fromkeys(range(len(costs)), 0)
    items = [cycle(each) for each in costs]
    for key in used:
        rounds.enter(key)
    for _ in range(steps):
        flow = rounds.turn()
        assert flow is not None
        cost = next(items[flow.key])
        rounds.charge(flow.key, cost)
        used[flow.key] += cost
        assert max(used.values()) - min(used.values()) <= QUANTUM + 2 * 350


@given(st.lists(COSTS, min_size=1, max_size=5))
def test_what_is_simulated_is_what_would_happen(costs: list[list[int]]) -> None:
    rounds = Rounds[int](QUANTUM)
    queues = [deque(each) for each in costs]
    for key in range(len(costs)):
        rounds.enter(key)

    def items(key: int) -> Iterator[tuple[int, int]]:
        return ((cost, key) for cost in costs[key])

    simulated = list(rounds.simulate(items))
    happened = []
    while (flow := rounds.turn()) is not None:
        cost = queues[flow.key].popleft()
        happened.append((cost, flow.key))
        rounds.charge(flow.key, cost)
        if not queues[flow.key]:
            rounds.leave(flow.key)
    assert simulated == happened


# -- the queue ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300)), max_size=60))
def test_a_fair_queue_gives_everything_once_and_each_clients_in_order(script: list[tuple[str, int]]) -> None:
    queue = FairQueue[str, tuple[str, int]](QUANTUM)
    for number, (client, cost) in enumerate(script):
        queue.put(client, (client, number), cost)
    assert len(queue) == len(script)
    found = []
    while queue:
        one = queue.pop_within(150) or queue.pop()
        assert script[one[1]][1] <= 150 or queue.pop_within(-1) is None
        found.append(one)
    assert sorted(number for _, number in found) == list(range(len(script)))
    for client in "abc":
        numbers = [number for other, number in found if other == client]
        assert numbers == sorted(numbers)
    assert queue.pop_within(math.inf) is None
    with pytest.raises(IndexError):
        queue.pop()


def test_an_item_that_costs_more_than_may_be_taken_stays_the_next() -> None:
    queue = FairQueue[str, int](QUANTUM)
    queue.put("a", 1, 50)
    queue.put("a", 2, 10)
    assert [queue.pop_within(49), queue.pop_within(50), queue.pop_within(50)] == [None, 1, 2]


def test_a_client_that_comes_to_a_queue_is_next_but_for_one_turn() -> None:
    queue = FairQueue[str, str](QUANTUM)
    for _ in range(1000):
        queue.put("flood", "flood", 10)
    queue.put("new", "new", 10)
    first = list(islice(iter(queue.pop, None), 12))
    assert "new" in first
