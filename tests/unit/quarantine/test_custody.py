"""What the death of a process means for the records that it may have had in its hands."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.intake.records import Death
from embedq_consumer.quarantine.custody import (
    MOST_DEATHS,
    Claimant,
    Custody,
    acquitted,
    decode,
    encode,
    take_over,
)

DEAD = Custody(owner="dead", replica="one", span=100)
ME = Claimant(owner="me", replica="two", span=50)


def after(before: Custody, committed: int = 10, end: int = 1000) -> Custody:
    return take_over(before, committed, end, claimant=ME, now_ms=5)


def test_a_partition_that_was_given_up_has_no_suspects() -> None:
    assert after(Custody()) == Custody(owner="me", replica="two", span=50)
    assert after(DEAD.released()) == Custody(owner="me", replica="two", span=50)


def test_its_own_owner_takes_it_over_without_suspicion() -> None:
    own = Custody(owner="me", replica="two", span=50)
    assert after(own) == own


def test_what_a_process_that_died_at_work_may_have_read_is_suspect() -> None:
    found = after(DEAD)
    assert (found.careful_until, found.careful_left) == (1000, 100)
    assert found.deaths == (Death(at_ms=5, replica="one"),)
    assert (found.owner, found.span) == ("me", 50)


def test_one_that_died_with_nothing_to_do_leaves_no_suspects() -> None:
    assert after(DEAD, committed=1000, end=1000) == Custody(owner="me", replica="two", span=50)


def test_a_group_in_which_a_process_died_runs_one_by_one() -> None:
    first = after(DEAD)
    tried = msgspec.structs.replace(first, trial_until=14, careful_left=96)
    found = take_over(tried, 10, 1000, claimant=Claimant(owner="third", replica="three", span=1), now_ms=6)
    assert (found.alone_until, found.trial_until) == (14, 0)
    assert (found.careful_until, found.careful_left) == (1000, 96)
    assert [death.replica for death in found.deaths] == ["one", "two"]


def test_a_process_that_died_between_two_trials_says_nothing_new() -> None:
    waiting = msgspec.structs.replace(after(DEAD), owner="other")
    found = after(waiting)
    assert (found.careful_until, found.careful_left, found.alone_until) == (1000, 100, 0)


def test_what_was_finished_before_the_death_is_no_suspect() -> None:
    tried = msgspec.structs.replace(after(DEAD), owner="other", trial_until=14)
    assert after(tried, committed=14).alone_until == 0
    assert after(tried, committed=13).alone_until == 14


def test_a_record_that_killed_twice_while_it_ran_alone_is_condemned() -> None:
    alone = msgspec.structs.replace(DEAD, alone_until=20, trial_until=11, alone=True)
    once = after(alone)
    assert (once.accused_until, once.accusations, once.condemned_until, once.alone_until) == (11, 1, 0, 20)
    again = msgspec.structs.replace(once, owner="other", trial_until=11, alone=True)
    twice = after(again)
    assert (twice.condemned_until, twice.alone_until) == (11, 20)
    assert after(msgspec.structs.replace(twice, owner="other")).condemned_until == 11, (
        "until it is dead-lettered"
    )


def test_two_records_that_died_alone_once_each_are_not_condemned() -> None:
    alone = msgspec.structs.replace(DEAD, alone_until=20, trial_until=11, alone=True)
    first = after(alone)
    other = msgspec.structs.replace(first, owner="other", trial_until=12, alone=True)
    second = after(other, committed=11)
    assert (second.accused_until, second.accusations, second.condemned_until) == (12, 1, 0)


def test_a_hand_over_in_order_keeps_the_suspicion() -> None:
    suspected = msgspec.structs.replace(
        DEAD, alone_until=20, careful_until=50, careful_left=3, deaths=(Death(at_ms=1, replica="x"),)
    )
    found = after(suspected.released())
    assert (found.alone_until, found.careful_until, found.careful_left) == (20, 50, 3)
    assert found.deaths == suspected.deaths


@pytest.mark.parametrize(
    "metadata", ["", "written by somebody else", "{}", "[1]", '{"owner": 3}', '{"span": "x"}', "{" * 5000]
)
def test_what_is_not_ours_says_nothing(metadata: str) -> None:
    assert decode(metadata) == Custody()


@given(
    st.text(max_size=256),
    st.integers(0, 2**63 - 1),
    st.integers(1, 20),
)
def test_it_fits_into_a_commit_and_comes_back_equal(replica: str, offset: int, deaths: int) -> None:
    custody = Custody(owner="f" * 16, replica=replica, span=5000, careful_until=offset, careful_left=9)
    for number in range(deaths):
        claimant = Claimant(owner=f"{number:016}", replica=replica, span=5000)
        custody = take_over(custody, 0, offset, claimant=claimant, now_ms=2**42)
        assert decode(encode(custody)) == custody
        assert len(encode(custody).encode()) < 4096
    assert len(custody.deaths) <= MOST_DEATHS


def test_acquitted_keeps_the_owner_alone() -> None:
    assert acquitted(after(DEAD)) == Custody(owner="me", replica="two", span=50)
