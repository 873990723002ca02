"""What may be published together: results and the offsets that cover exactly them."""

from __future__ import annotations

from aiokafka import TopicPartition
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import Reply
from embedq_consumer.exactly_once.held_results import Held, HeldResults, Release
from embedq_consumer.group import OffsetLedger, Ticket
from embedq_consumer.intake.records import Record
from embedq_shared.codec import Envelope
from embedq_shared.headers import JobHeaders

A, B = TopicPartition("jobs.bulk", 0), TopicPartition("jobs.bulk", 1)
EVERYTHING = 1 << 30


def answer(ticket: Ticket, size: int = 10) -> Held:
    record = Record(
        ticket=ticket,
        lane="bulk",
        key=None,
        value=b"job",
        headers=(),
        timestamp_ms=0,
        timestamp_type=0,
        polled_at=0.0,
    )
    result = Outgoing(topic="results", partition=None, key=None, value=b"x" * size, headers=[])
    reply = Reply(
        record=record,
        headers=JobHeaders(),
        format="json",
        envelope=Envelope(),
        outgoing=[result],
        status="ok",
    )
    return Held(reply=reply, records=[result], results=1, concluded=lambda reply, published: None)


def offsets_of(release: Release | None) -> list[int]:
    assert release is not None
    return [held.reply.record.ticket.offset for held in release.answers]


class Parts:
    def __init__(self, *partitions: TopicPartition) -> None:
        self.ledger = OffsetLedger()
        for partition in partitions:
            self.ledger.add(partition, None)
        self.held = HeldResults(self.ledger)

    def take(self, partition: TopicPartition, *offsets: int) -> list[Ticket]:
        return [self.ledger.begin(partition, offset) for offset in offsets]

    def publish(self, release: Release) -> None:
        self.held.published(release)
        self.ledger.note_committed(release.offsets)
        for held in release.answers:
            self.ledger.finish(held.reply.record.ticket)


def test_nothing_is_released_while_the_first_record_is_unfinished() -> None:
    parts = Parts(A)
    _, second = parts.take(A, 0, 1)
    parts.held.hold([answer(second)])
    assert parts.held.release(EVERYTHING) is None


def test_the_answers_before_the_first_unfinished_record_go_with_its_offset() -> None:
    parts = Parts(A)
    first, second, _, fourth = parts.take(A, 0, 1, 2, 3)
    parts.held.hold([answer(first), answer(second), answer(fourth)])
    release = parts.held.release(EVERYTHING)
    assert offsets_of(release) == [0, 1]
    assert release is not None
    assert release.offsets == {A: 2}


def test_with_all_answers_there_the_offset_is_the_position_past_gaps_and_markers() -> None:
    parts = Parts(A)
    parts.held.hold([answer(ticket) for ticket in parts.take(A, 5, 7)])
    parts.ledger.advance(A, 9)
    release = parts.held.release(EVERYTHING)
    assert release is not None
    assert release.offsets == {A: 9}


def test_an_answer_is_released_again_until_it_is_known_to_be_published() -> None:
    parts = Parts(A)
    parts.held.hold([answer(ticket) for ticket in parts.take(A, 0)])
    first = parts.held.release(EVERYTHING)
    assert parts.held.release(EVERYTHING) == first
    assert first is not None
    parts.publish(first)
    assert parts.held.release(EVERYTHING) is None
    assert len(parts.held) == 0


def test_a_release_stays_below_the_limit_but_holds_one_answer_at_least() -> None:
    parts = Parts(A)
    parts.held.hold([answer(ticket, 100) for ticket in parts.take(A, 0, 1, 2)])
    release = parts.held.release(2 * answer(Ticket(A, 1, 9), 100).size + 50)
    assert offsets_of(release) == [0, 1]
    assert release is not None
    assert release.offsets == {A: 2}
    assert offsets_of(parts.held.release(1)) == [0]


def test_a_mended_answer_takes_the_place_of_the_refused_one() -> None:
    parts = Parts(A)
    (ticket,) = parts.take(A, 0)
    parts.held.hold([answer(ticket, 10)])
    parts.held.hold([mended := answer(ticket, 20)])
    release = parts.held.release(EVERYTHING)
    assert release is not None
    assert release.answers == [mended]


def test_answers_of_a_partition_that_was_lost_are_given_up() -> None:
    parts = Parts(A, B)
    kept, lost = parts.take(A, 0)[0], parts.take(B, 0)[0]
    parts.held.hold([answer(kept), answer(lost)])
    parts.ledger.drop([B])
    assert [held.reply.record.ticket for held in parts.held.take_lost()] == [lost]
    assert len(parts.held) == 1


def test_an_answer_of_an_earlier_assignment_is_not_taken_for_one_of_this() -> None:
    parts = Parts(A)
    (before,) = parts.take(A, 0)
    parts.held.hold([answer(before)])
    parts.ledger.drop([A])
    parts.ledger.add(A, None)
    parts.take(A, 0)
    assert parts.held.release(EVERYTHING) is None
    assert [held.ticket for held in parts.held.take_lost()] == [before]


class Releases(RuleBasedStateMachine):
    """Takes, answers and releases in any order: what was published is always exactly what is below the offsets."""

    open = Bundle("open")

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts(A, B)
        self.next = {A: 0, B: 0}
        self.taken: dict[TopicPartition, set[int]] = {A: set(), B: set()}
        self.published: dict[TopicPartition, list[int]] = {A: [], B: []}
        self.committed = {A: 0, B: 0}

    @rule(target=open, partition=st.sampled_from([A, B]), gap=st.integers(1, 3))
    def take(self, partition: TopicPartition, gap: int) -> Ticket:
        offset = self.next[partition] + gap - 1
        self.next[partition] = offset + 1
        self.taken[partition].add(offset)
        return self.parts.take(partition, offset)[0]

    @rule(ticket=open)
    def complete(self, ticket: Ticket) -> None:
        if ticket.offset not in self.published[ticket.partition]:
            self.parts.held.hold([answer(ticket)])

    @rule(limit=st.sampled_from([1, 180, EVERYTHING]))
    def release(self, limit: int) -> None:
        release = self.parts.held.release(limit)
        if release is None:
            return
        assert release.answers
        for held in release.answers:
            ticket = held.reply.record.ticket
            self.published[ticket.partition].append(ticket.offset)
        for partition, offset in release.offsets.items():
            assert offset > self.committed[partition]
            self.committed[partition] = offset
        self.parts.publish(release)

    @invariant()
    def published_is_what_the_offsets_cover(self) -> None:
        for partition in (A, B):
            below = sorted(offset for offset in self.taken[partition] if offset < self.committed[partition])
            assert self.published[partition] == below


TestReleases = Releases.TestCase
