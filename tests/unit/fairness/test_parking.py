"""Records that wait to be started: in fair order, within shares, and never more of a partition than a crash may repeat."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from aiokafka import TopicPartition
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_consumer.fairness import Cost, Limits, Parking
from embedq_shared.topics import LANES, Lane

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


@dataclass(frozen=True)
class Ticket:
    partition: TopicPartition
    offset: int


@dataclass(frozen=True)
class Parked:
    ticket: Ticket
    client: bytes
    lane: Lane = "interactive"
    size: int = 100


class Lot:
    """A parking lot, with what is committed."""

    def __init__(self, **limits: Any) -> None:
        self.committed: dict[TopicPartition, int] = {}
        self.ends: dict[TopicPartition, int] = {}
        defaults: dict[str, Any] = {"jobs": 10_000, "texts": 10_000, "record_bytes": 10**9}
        defaults |= {"result_bytes": 10**9, "uncommitted": 10_000}
        self.limits = Limits(**defaults | limits)
        self.parking = Parking[Parked](self.limits, self.committed.get)

    def put(self, client: bytes, count: int = 1, partition: TopicPartition = A, **fields: Any) -> None:
        first = self.ends.get(partition, 0)
        self.ends[partition] = first + count
        self.parking.put(
            Parked(Ticket(partition, offset), client, **fields) for offset in range(first, first + count)
        )

    def start(self, most: int = 10**6, cost: Cost | None = None) -> list[Parked]:
        found: list[Parked] = []
        for record in self.parking.draw(most):
            self.parking.weigh(record, cost or Cost(1, 1000))
            found.append(record)
        return found


def clients(records: list[Parked]) -> list[bytes]:
    return [record.client for record in records]


def test_all_start_while_there_is_room_each_clients_in_order() -> None:
    lot = Lot()
    lot.put(b"a", 3)
    lot.put(b"b", 2)
    started = lot.start()
    assert [record.ticket.offset for record in started if record.client == b"a"] == [0, 1, 2]
    assert len(started) == 5
    assert not lot.parking
    assert not lot.parking.idle
    for record in started:
        lot.parking.finish(record)
    assert lot.parking.idle


def test_interactive_records_start_before_bulk_ones() -> None:
    lot = Lot()
    lot.put(b"a", 2, lane="bulk")
    lot.put(b"a", 2)
    assert [record.lane for record in lot.start()] == ["interactive"] * 2 + ["bulk"] * 2


def test_a_flood_leaves_room_for_a_client_that_comes() -> None:
    lot = Lot(texts=100)
    lot.put(b"flood", 6000)
    assert clients(lot.start()) == [b"flood"] * 50
    lot.put(b"new")
    assert clients(lot.start()) == [b"new"]


def test_shares_are_counted_in_texts_and_in_bytes_of_results_not_in_records() -> None:
    for cost in (Cost(2048, 1000), Cost(1, 13_000_000)):
        lot = Lot(texts=8192, result_bytes=104_000_000)
        lot.put(b"flood", 60)
        assert 2 <= len(lot.start(cost=cost)) <= 5
        lot.put(b"new")
        assert clients(lot.start()) == [b"new"]


def test_of_several_busy_clients_each_has_the_same_under_way_and_as_much_stays_free() -> None:
    lot = Lot(texts=1000)
    names = (b"a", b"b", b"c", b"d")
    for name in names:
        lot.put(name, 400)
    started = lot.start(cost=Cost(1, 256 * 1024))  # a turn each
    assert {name: clients(started).count(name) for name in names} == dict.fromkeys(names, 200)
    lot.put(b"new", 500)
    assert 90 <= clients(lot.start()).count(b"new") <= 200


def test_a_client_that_had_its_share_starts_many_at_a_time_again() -> None:
    lot = Lot(texts=1000)
    lot.put(b"a", 2000)
    started = lot.start()
    assert len(started) == 500
    for record in started[:70]:
        lot.parking.finish(record)
        assert lot.start() == []
    for record in started[70:80]:
        lot.parking.finish(record)
    assert len(lot.start()) == 80


def test_giving_back_more_than_was_taken_is_an_error() -> None:
    lot = Lot()
    lot.put(b"a")
    lot.put(b"a", size=1)
    large, _ = lot.start()
    lot.parking.finish(large)
    with pytest.raises(RuntimeError, match="bug"):
        lot.parking.finish(large)


def test_bytes_of_records_are_shared_too() -> None:
    lot = Lot(record_bytes=1000)
    lot.put(b"flood", 60)
    assert len(lot.start()) == 5
    lot.put(b"new")
    assert clients(lot.start()) == [b"new"]


def test_a_client_whose_jobs_are_large_gets_fewer_of_them() -> None:
    lot = Lot(result_bytes=10**12)
    lot.put(b"large", 400)
    lot.put(b"small", 400)
    started = []
    for record in lot.parking.draw(400):
        lot.parking.weigh(record, Cost(1, 10_000_000 if record.client == b"large" else 1_000_000))
        started.append(record.client)
    assert 5 <= started.count(b"small") / started.count(b"large") <= 15


def test_a_job_larger_than_everything_starts_while_anything_is_free_and_then_no_other_does() -> None:
    lot = Lot(result_bytes=1000)
    lot.put(b"other", 5)
    first = lot.start(cost=Cost(1, 600))
    assert len(first) == 1
    lot.put(b"large")
    large = lot.start(cost=Cost(1, 1_000_000))
    assert clients(large) == [b"large"]
    lot.parking.finish(first[0])
    assert lot.start() == []
    lot.parking.finish(large[0])
    assert clients(lot.start(cost=Cost(1, 600))) == [b"other"]


def test_a_partition_starts_no_more_than_a_crash_may_repeat() -> None:
    lot = Lot(uncommitted=4)
    lot.put(b"a", 10)
    lot.put(b"a", 3, partition=B)
    started = [record.ticket for record in lot.start()]
    assert [ticket.offset for ticket in started if ticket.partition == A] == [0, 1, 2, 3]
    assert [ticket.offset for ticket in started if ticket.partition == B] == [0, 1, 2]
    lot.committed[A] = 2
    assert [record.ticket.offset for record in lot.start()] == [4, 5]


class Counted:
    """A record that counts how often its place is looked at."""

    client = b"a"
    lane: Lane = "interactive"
    size = 100
    looks = 0

    def __init__(self, offset: int) -> None:
        self._ticket = Ticket(A, offset)

    @property
    def ticket(self) -> Ticket:
        Counted.looks += 1
        return self._ticket


def test_what_a_start_costs_does_not_grow_with_what_waits() -> None:
    """A backlog's records wait by the thousand, and some start whenever some are answered."""
    lot = Lot(uncommitted=100)
    parking = Parking[Counted](lot.limits, lot.committed.get)
    parking.put(Counted(offset) for offset in range(5000))
    assert len(list(parking.draw(5000))) == 100
    for done in range(1, 50):
        lot.committed[A] = done
        Counted.looks = 0
        assert len(list(parking.draw(5000))) == 1
        assert Counted.looks < 20


def test_behind_one_that_waits_only_half_as_many_start_so_that_it_can_start_itself() -> None:
    lot = Lot(uncommitted=8, texts=2)
    lot.put(b"flood", 10)
    assert len(lot.start()) == 1
    lot.put(b"new", 10)
    found = []
    for _ in range(10):
        found += (started := lot.start())
        for record in started:
            if record.client == b"new":
                lot.parking.finish(record)
    assert clients(found) == [b"new"] * 4
    assert clients(lot.start()) == []


def test_no_two_partitions_wait_for_each_other() -> None:
    """The first record of each is behind one of the other in its client's order."""
    lot = Lot(uncommitted=2)
    lot.put(b"z", 2)
    lot.put(b"z", 2, partition=B)
    first = lot.start()
    assert len(first) == 4
    lot.put(b"x", partition=A)
    lot.put(b"y", partition=B)
    lot.put(b"x", partition=B)
    lot.put(b"y", partition=A)
    assert lot.start() == []
    for record in first:
        lot.parking.finish(record)
    lot.committed |= {A: 2, B: 2}
    assert len(lot.start()) >= 2
    lot.committed |= {A: 4, B: 4}
    lot.start()
    assert not lot.parking


def test_what_is_dropped_is_given_out_once_and_never_started() -> None:
    lot = Lot(texts=4, uncommitted=4)
    lot.put(b"a", 5)
    lot.put(b"b", 5, partition=B)
    started = lot.start()
    dropped = lot.parking.drop([A])
    assert {record.ticket.partition for record in dropped} == {A}
    assert {record.ticket for record in dropped}.isdisjoint({record.ticket for record in started})
    for record in started:
        lot.parking.finish(record)
    assert {record.ticket.partition for record in lot.start()} == {B}
    lot.parking.drop([A, B])
    assert not lot.parking


def test_jobs_are_shared_as_their_texts_are_and_their_bound_may_change() -> None:
    lot = Lot(jobs=6)
    lot.put(b"flood", 20)
    assert len(lot.start()) == 3
    lot.put(b"new", 20)
    assert clients(lot.start()) == [b"new"] * 2
    lot.parking.allow("interactive", 12)
    assert len(lot.start()) == 4


def test_of_a_partition_that_is_withheld_nothing_starts_and_the_others_go_on() -> None:
    lot = Lot()
    lot.put(b"a", 2)
    lot.put(b"a", 2, partition=B)
    lot.parking.withhold([A])
    assert {record.ticket.partition for record in lot.start()} == {B}
    lot.parking.withhold([])
    assert {record.ticket.partition for record in lot.start()} == {A}
    assert lot.parking.partitions == {A, B}


def test_a_record_holds_others_back_once_half_of_the_bound_is_started_behind_it() -> None:
    lot = Lot(uncommitted=8)
    lot.put(b"a", 5)
    started = lot.start()
    assert [lot.parking.holds_back(record.ticket) for record in started] == [True, *[False] * 4]
    lot.committed[A] = 2
    assert not lot.parking.holds_back(started[2].ticket)


def test_a_partition_in_order_starts_nothing_before_the_first_that_waits() -> None:
    lot = Lot(texts=4, ordered=frozenset({"bulk"}))
    lot.put(b"flood", 10, lane="bulk")
    lot.put(b"new", 1, lane="bulk")
    lot.put(b"new", 1, B, lane="bulk")
    assert [(record.client, record.ticket.partition) for record in lot.start()] == [
        (b"flood", A),
        (b"flood", A),
        (b"new", B),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_answers_that_are_held_until_those_before_them_are_there_never_stop_an_ordered_lane(
    seed: int,
) -> None:
    """A flood, and behind it in the same partition a thousand clients with a job each, computed in any order."""
    lot = Lot(jobs=256, uncommitted=2048, ordered=frozenset({"bulk"}))
    lot.committed[A] = 0
    lot.put(b"flood", 600, lane="bulk")
    for number in range(1000):
        lot.put(b"%d" % number, lane="bulk")
    random = Random(seed)
    computing: list[Parked] = []
    held: dict[int, Parked] = {}
    while lot.committed[A] < 1600:
        computing += lot.start()
        assert computing, "stuck"
        random.shuffle(computing)
        for record in computing[:80]:
            held[record.ticket.offset] = record
        del computing[:80]
        while record_at_front := held.pop(lot.committed[A], None):
            lot.parking.finish(record_at_front)
            lot.committed[A] += 1


class ParkingMachine(RuleBasedStateMachine):
    """Whatever comes: each record once, in its client's and partition's order, within the bounds; and nothing gets stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.lot = Lot(texts=20, result_bytes=50_000, record_bytes=5_000, uncommitted=6)
        self.waiting: list[Parked] = []
        self.started: list[Parked] = []
        self.done: dict[TopicPartition, set[int]] = {A: set(), B: set()}

    @rule(
        client=st.sampled_from([b"a", b"b", b"c"]),
        lane=st.sampled_from(LANES),
        partition=st.sampled_from([A, B]),
        count=st.integers(1, 8),
    )
    def put(self, client: bytes, lane: Lane, partition: TopicPartition, count: int) -> None:
        first = self.lot.ends.get(partition, 0)
        self.lot.put(client, count, partition, lane=lane)
        self.waiting += [Parked(Ticket(partition, first + number), client, lane) for number in range(count)]

    @rule(most=st.integers(1, 5), texts=st.integers(1, 15), size=st.integers(0, 30_000))
    def start(self, most: int, texts: int, size: int) -> None:
        for record in self.lot.start(most, Cost(texts, size)):
            same = [
                other
                for other in self.waiting
                if (other.client, other.lane, other.ticket.partition)
                == (record.client, record.lane, record.ticket.partition)
            ]
            assert same[0] == record
            self.waiting.remove(record)
            self.started.append(record)

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.started))
        self.started.remove(record)
        self.lot.parking.finish(record)
        self.done[record.ticket.partition].add(record.ticket.offset)

    @rule(partition=st.sampled_from([A, B]))
    def commit(self, partition: TopicPartition) -> None:
        offset = 0
        while offset in self.done[partition]:
            offset += 1
        self.lot.committed[partition] = offset

    @invariant()
    def no_more_is_started_than_a_crash_may_repeat(self) -> None:
        for partition in (A, B):
            offsets = self.done[partition] | {
                record.ticket.offset for record in self.started if record.ticket.partition == partition
            }
            done = self.lot.committed.get(partition, 0)
            assert sum(offset >= done for offset in offsets) <= 6

    @invariant()
    def it_knows_what_waits(self) -> None:
        assert bool(self.lot.parking) is bool(self.waiting)
        assert self.lot.parking.idle is (not self.started)
        for lane in LANES:
            assert self.lot.parking.parked(lane) == sum(record.lane == lane for record in self.waiting)

    def teardown(self) -> None:
        """Once all that was started is answered and committed, the rest starts."""
        while self.waiting:
            for record in list(self.started):
                self.started.remove(record)
                self.lot.parking.finish(record)
                self.done[record.ticket.partition].add(record.ticket.offset)
            self.commit(A)
            self.commit(B)
            before = len(self.waiting)
            self.start(10, 1, 100)
            assert len(self.waiting) < before, "stuck"


TestParking = ParkingMachine.TestCase
TestParking.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
