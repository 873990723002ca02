"""How much one client may hold: as much as is left free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.fairness import Shares


def fill(shares: Shares[str], *clients: str, amount: int = 1) -> None:
    """Each takes in turn what it may."""
    while takers := [client for client in clients if shares.may_take(client)]:
        for client in takers:
            if shares.may_take(client):
                shares.take(client, amount)


def test_one_client_alone_gets_half() -> None:
    shares = Shares[str](1000)
    fill(shares, "a")
    assert shares.held("a") == 500


def test_of_several_busy_clients_each_gets_the_same_and_as_much_stays_free() -> None:
    shares = Shares[str](1000)
    fill(shares, *"abcd")
    assert [shares.held(client) for client in "abcd"] == [200] * 4
    assert shares.free == 200
    assert shares.may_take("new")


def test_one_that_comes_later_gets_its_share_while_the_others_give_back() -> None:
    shares = Shares[str](1000)
    fill(shares, "a")
    for _ in range(500):
        shares.give_back("a", 1)
        fill(shares, "a", "b")
    assert abs(shares.held("a") - shares.held("b")) <= 1


def test_with_nothing_held_anything_may_be_taken_and_then_nothing_more() -> None:
    shares = Shares[str](10)
    assert shares.may_take("a")
    shares.take("a", 1000)
    assert not shares.may_take("a")
    assert not shares.may_take("b")
    shares.give_back("a", 1000)
    assert shares.may_take("b")


def test_giving_back_more_than_was_held_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="bug"):
        Shares[str](10).give_back("a", 1)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 300), st.booleans()), max_size=80))
def test_the_limit_is_passed_by_what_the_last_one_took_at_most(script: list[tuple[str, int, bool]]) -> None:
    shares = Shares[str](1000)
    held: list[tuple[str, int]] = []
    for client, amount, gives_back in script:
        if gives_back and held:
            shares.give_back(*held.pop(0))
        elif shares.may_take(client):
            before = shares.free
            shares.take(client, amount)
            held.append((client, amount))
            assert before > 0
        mine = sum(amount for other, amount in held if other == client)
        assert shares.held(client) == mine
        assert shares.total == sum(amount for _, amount in held)
        assert shares.total < 1000 + 300
        if shares.free > 0:
            assert shares.may_take("nobody")
    for client, amount in held:
        shares.give_back(client, amount)
    assert shares.total == 0
