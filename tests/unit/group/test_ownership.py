"""Partitions on their way between replicas: one replica's view, and a whole group of them in every order of events."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_consumer.group.assignor import decode_claim, share
from embedq_consumer.group.ownership import Change, Ownership
from embedq_shared.kafka import Membership

PARTITIONS = {"jobs": [0, 1, 2, 3, 4], "jobs.bulk": [0, 1, 2]}
ALL = frozenset(TopicPartition(topic, number) for topic, numbers in PARTITIONS.items() for number in numbers)
A, B, C = sorted(ALL)[:3]


class Replica:
    """One member: what it knows of itself, what of a partition it has not finished, and where it is in a rebalance."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ownership = Ownership()
        self.unfinished: set[TopicPartition] = set()
        self.wants_rejoin = True
        self.claim: bytes | None = None
        """As of its JoinGroup; None while it has sent none for the rebalance under way."""
        self.alive = True
        self.share: tuple[frozenset[TopicPartition], frozenset[TopicPartition]] | None = None
        """The answer to SyncGroup, on its way."""


class GroupMachine(RuleBasedStateMachine):
    """A group of replicas and its coordinator.

    The coordinator is Kafka's: a rebalance begins when somebody joins, leaves or is thrown out; it is over when all
    members have joined; each then gets its share when its answer arrives, at any time later. A commit is taken from a
    member that shows the present generation, and no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, Replica] = {}
        self.thrown_out: list[Replica] = []
        self.generation = 0
        self.rebalancing = False
        self.names = iter(range(10_000))
        self.changes_done = 0

    def some(self, data: st.DataObject) -> Replica | None:
        return data.draw(st.sampled_from([*self.members.values()])) if self.members else None

    # -- the world ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.members) < 4)
    @rule()
    def somebody_joins(self) -> None:
        name = f"m{next(self.names):04}"
        self.members[name] = Replica(name)
        self.begin_rebalance()

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data())
    def somebody_is_gone(self, data: st.DataObject) -> None:
        """A leaver, or a killed one whose session is over."""
        replica = self.some(data)
        assert replica is not None
        replica.alive = False
        del self.members[replica.name]
        self.begin_rebalance()

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data())
    def somebody_sleeps_through_its_session(self, data: st.DataObject) -> None:
        """It works on, and has not heard that it is no member."""
        replica = self.some(data)
        assert replica is not None
        del self.members[replica.name]
        self.thrown_out.append(replica)
        self.begin_rebalance()

    @precondition(lambda self: self.thrown_out)
    @rule()
    def a_sleeper_hears_of_it_and_joins_anew(self) -> None:
        replica = self.thrown_out.pop(0)
        replica.ownership.expelled()
        replica.unfinished.clear()
        replica.name = f"m{next(self.names):04}"
        replica.claim = replica.share = None
        self.members[replica.name] = replica
        self.begin_rebalance()

    def begin_rebalance(self) -> None:
        self.rebalancing = True
        for replica in self.members.values():
            if replica.share is not None:  # SyncGroup is answered with an error
                replica.share = None
                replica.claim = None

    # -- the protocol -------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def a_member_joins_the_rebalance(self, data: st.DataObject) -> None:
        replica = self.some(data)
        if replica is None or replica.share is not None or replica.claim is not None:
            return
        if replica.wants_rejoin or self.rebalancing:
            replica.claim = replica.ownership.claim()
            replica.wants_rejoin = False
            if not self.rebalancing:
                self.begin_rebalance()
                replica.claim = replica.claim
        self.complete_if_all_joined()

    def complete_if_all_joined(self) -> None:
        if not self.rebalancing or any(replica.claim is None for replica in self.members.values()):
            return
        self.generation += 1
        self.rebalancing = False
        found = share(
            PARTITIONS,
            {
                name: (PARTITIONS, decode_claim(replica.claim or b""))
                for name, replica in self.members.items()
            },
        )
        for name, replica in self.members.items():
            replica.share = found[name].partitions, found[name].release
            replica.claim = None

    @rule(data=st.data())
    def a_share_arrives(self, data: st.DataObject) -> None:
        replica = self.some(data)
        if replica is None or replica.share is None:
            return
        partitions, release = replica.share
        replica.share = None
        change = replica.ownership.assigned(Membership(replica.name, self.generation), partitions, release)
        replica.unfinished -= change.lost
        self.check_rejoin(replica)

    # -- the work -----------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def a_partition_is_opened_and_read(self, data: st.DataObject) -> None:
        replica = self.some(data)
        if replica is None:
            return
        for partition in sorted(replica.ownership.opening):
            replica.ownership.opened(partition)
        replica.unfinished |= replica.ownership.reading

    @rule(data=st.data())
    def a_partition_is_drained(self, data: st.DataObject) -> None:
        replica = self.some(data)
        if replica is None or not replica.ownership.releasing:
            return
        # The last commit must be taken, and no commit is between a rebalance's end and the arrival of the share.
        membership = replica.ownership.membership
        assert membership is not None
        if membership.generation != self.generation or replica.share is not None:
            return
        partition = min(replica.ownership.releasing)
        replica.unfinished.discard(partition)
        replica.ownership.released(partition)
        self.check_rejoin(replica)

    @staticmethod
    def check_rejoin(replica: Replica) -> None:
        if replica.ownership.take_rejoin():
            replica.wants_rejoin = True

    # -- what is always so ----------------------------------------------------------------------------------------------

    @invariant()
    def what_one_works_on_nobody_else_has(self) -> None:
        """Members whose commits the coordinator takes: of the present generation, with their share at hand."""
        holders = [
            replica.ownership
            for replica in self.members.values()
            if replica.ownership.membership == Membership(replica.name, self.generation)
        ]
        held = [partition for its in holders for partition in its.opening | its.reading | its.releasing]
        assert len(held) == len(set(held))
        for replica in self.members.values():
            if replica.share is not None:
                partitions, _ = replica.share
                assert not partitions & frozenset(held)

    @invariant()
    def what_is_unfinished_is_owned(self) -> None:
        for replica in self.members.values():
            its = replica.ownership
            assert replica.unfinished <= its.reading | its.releasing

    def teardown(self) -> None:
        """Left alone, the group comes to rest: everything is read, evenly, after two rebalances for the last change and
        one for each that was under way."""
        while self.thrown_out:
            self.a_sleeper_hears_of_it_and_joins_anew()
        if not self.members:
            return
        before = self.generation
        for _ in range(200):
            for replica in self.members.values():
                if (
                    replica.share is None
                    and replica.claim is None
                    and (self.rebalancing or replica.wants_rejoin)
                ):
                    replica.claim = replica.ownership.claim()
                    replica.wants_rejoin = False
                    self.rebalancing = True
            self.complete_if_all_joined()
            for replica in self.members.values():
                if replica.share is not None:
                    partitions, release = replica.share
                    replica.share = None
                    replica.ownership.assigned(Membership(replica.name, self.generation), partitions, release)
            for replica in self.members.values():
                for partition in replica.ownership.opening:
                    replica.ownership.opened(partition)
                for partition in replica.ownership.releasing:
                    replica.ownership.released(partition)
                self.check_rejoin(replica)
            if not self.rebalancing and not any(replica.wants_rejoin for replica in self.members.values()):
                break
        reading = [replica.ownership.reading for replica in self.members.values()]
        assert sum(map(len, reading)) == len(ALL)
        assert frozenset().union(*reading) == ALL
        assert max(map(len, reading)) - min(map(len, reading)) <= 1
        assert self.generation - before <= 3


GroupMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestGroupInEveryOrder = GroupMachine.TestCase


# -- one replica's view -------------------------------------------------------------------------------------------------


def member(*partitions: TopicPartition, generation: int = 1) -> Ownership:
    ownership = Ownership()
    ownership.assigned(Membership("me", generation), partitions, ())
    for partition in partitions:
        ownership.opened(partition)
    return ownership


def test_what_is_new_is_opened_and_what_was_there_is_read_on() -> None:
    ownership = member(A)
    change = ownership.assigned(Membership("me", 2), {A, B}, ())
    assert change == Change(added=frozenset({B}))
    assert ownership.reading == {A}
    assert ownership.opening == {B}


def test_what_is_to_be_released_is_ours_until_it_is_and_then_one_rejoin_is_due() -> None:
    ownership = member(A, B, C)
    change = ownership.assigned(Membership("me", 2), {A}, {B, C})
    assert change.lost == frozenset()
    assert ownership.releasing == {B, C}
    ownership.released(B)
    assert not ownership.take_rejoin()
    ownership.released(C)
    assert ownership.take_rejoin()
    assert not ownership.take_rejoin()
    claim = decode_claim(ownership.claim())
    assert claim is not None
    assert (claim.generation, claim.owned) == (2, {A.topic: [A.partition]})


def test_what_is_to_be_released_is_claimed_meanwhile() -> None:
    ownership = member(A, B)
    ownership.assigned(Membership("me", 2), {A}, {B})
    claim = decode_claim(ownership.claim())
    assert claim is not None
    assert claim.owned == {A.topic: [A.partition, B.partition]}


def test_a_release_that_another_rebalance_takes_back_is_read_on() -> None:
    ownership = member(A, B)
    ownership.assigned(Membership("me", 2), {A}, {B})
    change = ownership.assigned(Membership("me", 3), {A, B}, ())
    assert change == Change()
    assert ownership.reading == {A, B}
    assert not ownership.take_rejoin()


def test_a_partition_that_was_released_before_the_group_asked_for_it_still_needs_a_rejoin() -> None:
    """It was claimed in the JoinGroup, drained while that waited, and given to nobody."""
    ownership = member(A, B)
    ownership.assigned(Membership("me", 2), {A}, {B})
    ownership.released(B)
    ownership.take_rejoin()
    ownership.assigned(Membership("me", 3), {A}, {B})
    assert ownership.releasing == frozenset()
    assert ownership.take_rejoin()


def test_what_a_leader_of_the_former_kind_gives_to_others_is_lost_at_once() -> None:
    ownership = member(A, B)
    change = ownership.assigned(Membership("me", 2), {B}, ())
    assert change == Change(lost=frozenset({A}))
    assert ownership.reading == {B}


def test_who_is_expelled_owns_nothing_and_claims_nothing() -> None:
    ownership = member(A, B)
    assert ownership.expelled().lost == {A, B}
    assert (len(ownership), ownership.membership) == (0, None)
    claim = decode_claim(ownership.claim())
    assert claim is not None
    assert (claim.generation, claim.owned) == (-1, {})


def test_an_opening_that_ends_after_the_partition_was_lost_changes_nothing() -> None:
    ownership = Ownership()
    ownership.assigned(Membership("me", 1), {A}, ())
    ownership.assigned(Membership("me", 2), (), ())
    ownership.opened(A)
    assert ownership.stage(A) is None


def test_only_what_is_to_be_released_is() -> None:
    with pytest.raises(RuntimeError, match="This is a bug"):
        member(A).released(A)
