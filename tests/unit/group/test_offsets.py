"""The ledger against a model that is too simple to be wrong: every record ever taken, and what became of it."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from embedq_consumer.group.offsets import OffsetLedger, Ticket

A, B = TopicPartition("jobs", 0), TopicPartition("jobs", 1)
PARTITIONS = (A, B, TopicPartition("jobs.bulk", 0))


class LedgerMachine(RuleBasedStateMachine):
    """Takes, finishes, gaps, commits and rebalances in any order, with tickets of every epoch.

    The model keeps the offsets delivered in this epoch in one list, the finished ones in a set, and where the client's
    position is. What may be committed follows from them by looking at all of it.
    """

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = OffsetLedger()
        self.epochs: dict[TopicPartition, int] = {}
        self.adds = 0
        self.start: dict[TopicPartition, int | None] = {}
        self.taken: dict[TopicPartition, list[int]] = {}
        self.finished: dict[TopicPartition, set[int]] = {}
        self.started: dict[TopicPartition, set[int]] = {}
        self.position: dict[TopicPartition, int | None] = {}
        self.noted: dict[TopicPartition, int] = {}
        self.seen: dict[TopicPartition, int] = {}

    @rule(partition=st.sampled_from(PARTITIONS), start=st.none() | st.integers(0, 5))
    def add(self, partition: TopicPartition, start: int | None) -> None:
        """It comes, or comes again: a new epoch of this partition, and of no other."""
        self.ledger.add(partition, start)
        self.adds += 1
        self.forget(partition)
        self.epochs[partition] = self.adds
        self.start[partition] = start
        self.taken[partition] = []
        self.finished[partition] = set()
        self.started[partition] = set()
        self.position[partition] = None
        if start is not None:
            self.noted[partition] = start

    @rule(partitions=st.sets(st.sampled_from(PARTITIONS)))
    def drop(self, partitions: set[TopicPartition]) -> None:
        self.ledger.drop(partitions)
        for partition in partitions:
            self.forget(partition)

    def forget(self, partition: TopicPartition) -> None:
        for known in (
            self.epochs,
            self.start,
            self.taken,
            self.finished,
            self.started,
            self.position,
            self.noted,
            self.seen,
        ):
            known.pop(partition, None)

    @rule(
        target=tickets,
        partition=st.sampled_from(PARTITIONS),
        gap=st.integers(0, 3),
        count=st.integers(1, 4),
    )
    def poll(self, partition: TopicPartition, gap: int, count: int) -> object:
        """Some records after the position; before them a hole, as compaction and markers leave them."""
        if partition not in self.taken:
            with pytest.raises(KeyError):
                self.ledger.begin(partition, 0)
            return multiple()
        first = (self.position[partition] or self.start[partition] or 0) + gap
        offsets = range(first, first + count)
        found = [self.ledger.begin(partition, offset) for offset in offsets]
        assert found == [Ticket(partition, self.epochs[partition], offset) for offset in offsets]
        self.taken[partition] += offsets
        self.position[partition] = first + count
        return multiple(*found)

    @rule(partition=st.sampled_from(PARTITIONS), hole=st.integers(-3, 3))
    def step_over_a_gap(self, partition: TopicPartition, hole: int) -> None:
        """The client's position moves past something that is no record; an old position changes nothing."""
        position = max(0, (self.position.get(partition) or self.start.get(partition) or 0) + hole)
        self.ledger.advance(partition, position)
        if partition in self.position:
            before = (
                self.position[partition] if self.position[partition] is not None else self.start[partition]
            )
            if before is None or position > before:
                self.position[partition] = position

    @rule(ticket=tickets)
    def begin_work(self, ticket: Ticket) -> None:
        """On any ticket, in any order."""
        self.ledger.start(ticket)
        if ticket.epoch == self.epochs.get(ticket.partition):
            self.started[ticket.partition].add(ticket.offset)

    @rule(ticket=tickets)
    def finish(self, ticket: Ticket) -> None:
        """Any ticket: of this epoch or an earlier one, finished before or not."""
        current = ticket.epoch == self.epochs.get(ticket.partition)
        expected = current and ticket.offset not in self.finished[ticket.partition]
        assert self.ledger.finish(ticket) is expected
        if current:
            self.finished[ticket.partition].add(ticket.offset)

    @rule()
    def commit(self) -> None:
        offsets = self.ledger.committable()
        self.ledger.note_committed(offsets)
        self.noted |= offsets
        assert self.ledger.committable() == {}

    @rule(partition=st.sampled_from(PARTITIONS))
    def take_an_offset_again(self, partition: TopicPartition) -> None:
        if self.position.get(partition):
            with pytest.raises(ValueError, match="taken twice"):
                self.ledger.begin(partition, self.position[partition] - 1)  # type: ignore[operator]

    def safe(self, partition: TopicPartition) -> int | None:
        """Where a reader may start again without missing a record that is not answered."""
        unfinished = [o for o in self.taken[partition] if o not in self.finished[partition]]
        return min(unfinished) if unfinished else self.position[partition]

    @invariant()
    def what_is_committable_is_what_the_model_says(self) -> None:
        expected = {}
        for partition in self.taken:
            safe = self.safe(partition)
            if safe is not None and safe > self.noted.get(partition, -1):
                expected[partition] = safe
        assert self.ledger.committable() == expected

    @invariant()
    def no_commit_passes_an_unfinished_record(self) -> None:
        for partition, offset in self.ledger.committable().items():
            assert all(o in self.finished[partition] for o in self.taken[partition] if o < offset)

    @invariant()
    def within_an_epoch_nothing_goes_back(self) -> None:
        for partition, offset in self.ledger.committable().items():
            assert offset >= self.seen.get(partition, 0)
            assert offset > self.noted.get(partition, -1)
            self.seen[partition] = offset

    @invariant()
    def it_counts_what_the_model_counts(self) -> None:
        assert self.ledger.partitions == frozenset(self.taken)
        for partition in PARTITIONS:
            unfinished = sorted(set(self.taken.get(partition, ())) - self.finished.get(partition, set()))
            assert list(self.ledger.unfinished(partition)) == unfinished
            at_work = [offset for offset in unfinished if offset in self.started[partition]]
            assert self.ledger.in_flight(partition) == len(at_work)
            lowest = Ticket(partition, self.epochs[partition], at_work[0]) if at_work else None
            assert self.ledger.lowest(partition) == lowest
            assert self.ledger.epoch(partition) == self.epochs.get(partition)
            position = self.position.get(partition)
            assert self.ledger.position(partition) == (
                self.start.get(partition) if position is None else position
            )
            assert self.ledger.committed(partition) == self.noted.get(partition)


LedgerMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestLedgerAgainstAModel = LedgerMachine.TestCase


def test_commit_stops_at_the_oldest_unfinished_record() -> None:
    ledger = OffsetLedger()
    ledger.add(A, None)
    first, second, third = (ledger.begin(A, offset) for offset in (10, 11, 12))
    ledger.finish(third)
    ledger.finish(second)
    assert ledger.committable() == {A: 10}
    ledger.finish(first)
    assert ledger.committable() == {A: 13}


def test_a_gap_after_the_last_record_is_stepped_over() -> None:
    ledger = OffsetLedger()
    ledger.add(A, None)
    ledger.finish(ledger.begin(A, 5))
    ledger.advance(A, 9)  # a transaction's marker and two compacted records
    assert ledger.committable() == {A: 9}


def test_a_ticket_of_an_earlier_assignment_finishes_nothing() -> None:
    ledger = OffsetLedger()
    ledger.add(A, None)
    stale = ledger.begin(A, 0)
    ledger.drop([A])
    ledger.add(A, None)
    again = ledger.begin(A, 0)
    assert ledger.finish(stale) is False
    assert ledger.committable() == {A: 0}
    assert ledger.finish(again) is True
    assert ledger.committable() == {A: 1}


def test_a_commit_of_an_earlier_epoch_is_not_taken_for_progress() -> None:
    ledger = OffsetLedger()
    ledger.add(A, None)
    ledger.drop([A])
    ledger.note_committed({A: 7})
    assert ledger.committed(A) is None


def test_another_partition_that_comes_or_goes_changes_nothing_for_those_that_stay() -> None:
    ledger = OffsetLedger()
    ledger.add(A, 10)
    ticket = ledger.begin(A, 10)
    ledger.add(B, None)
    ledger.drop([B])
    assert ledger.position(A) == 11
    assert ledger.finish(ticket) is True
    assert ledger.committable() == {A: 11}


def test_a_topic_that_was_made_anew_is_committed_from_its_beginning() -> None:
    ledger = OffsetLedger()
    ledger.add(A, 100)
    ledger.finish(ledger.begin(A, 0))
    assert ledger.committable() == {A: 1}


def test_a_partition_begins_where_it_was_committed_and_there_is_nothing_to_commit_yet() -> None:
    ledger = OffsetLedger()
    ledger.add(A, 7)
    assert (ledger.position(A), ledger.committed(A), ledger.committable()) == (7, 7, {})
    ledger.advance(A, 7)
    assert ledger.committable() == {}
