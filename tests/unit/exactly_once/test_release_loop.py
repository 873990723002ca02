"""The loop around one transaction after another: what is tried again, what is changed, what is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from embedq_consumer.delivery.result_records import Reply, ResultEncoder
from embedq_consumer.exactly_once import release_loop
from embedq_consumer.exactly_once.answers import Answers
from embedq_consumer.exactly_once.held_results import HeldResults
from embedq_consumer.exactly_once.refusals import Refusals
from embedq_consumer.exactly_once.release_loop import ReleaseLoop
from embedq_consumer.exactly_once.transactions import Attempt, Offsets, Parcel
from embedq_consumer.group import OffsetLedger
from embedq_consumer.intake.records import Record
from embedq_consumer.retries import RetryPolicy, RetryTiers, Tier
from embedq_shared.codec import Envelope
from embedq_shared.headers import JobHeaders
from embedq_shared.kafka import FencedMember, Membership, OffsetAndMetadata, TopicPartition
from embedq_shared.messages import ErrorBody
from tests.helpers.in_flight import TOPICS
from tests.helpers.support import wait_until

A = TopicPartition(TOPICS.bulk, 0)
Becomes = Callable[[Sequence[Parcel]], Attempt]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits waits a fraction of it."""
    monkeypatch.setattr(release_loop, "_LOOK_S", 0.05)
    monkeypatch.setattr(release_loop, "_FIRST_PAUSE_S", 0.005)


def committed(parcels: Sequence[Parcel]) -> Attempt:
    return Attempt(outcome="committed")


def refusing(error: KafkaError, *topics: str) -> Becomes:
    """The brokers do not take what goes to these topics."""

    def become(parcels: Sequence[Parcel]) -> Attempt:
        reasons = [error if parcel.record.topic in topics else None for parcel in parcels]
        return Attempt(outcome="refused" if any(reasons) else "committed", reasons=reasons)

    return become


class Kafka:
    """Brokers, group and transactions of a test: each transaction becomes what the test says, the last one for ever."""

    def __init__(self) -> None:
        self.becomes: list[Becomes] = [committed]
        self.doubts: list[bool | None] = []
        self.published: list[list[tuple[str, int]]] = []
        self.offsets: list[dict[TopicPartition, int]] = []
        self.alone: list[list[bool]] = []
        self.members: list[Membership | None] = [Membership("me", 1)]
        self.seal_errors: list[BaseException] = []
        self.away = False
        self.committing = False
        self.told: list[str | None] = []

    @property
    def topics(self) -> Kafka:
        return self

    @property
    def presence(self) -> Kafka:
        return self

    def partitions(self, topic: str) -> int | None:
        return 3

    async def publish(self, parcels: Sequence[Parcel], offsets: Offsets, member: FencedMember) -> Attempt:
        assert self.committing, "a transaction that other commits may overtake"
        attempt = (self.becomes.pop(0) if len(self.becomes) > 1 else self.becomes[0])(parcels)
        self.alone.append([parcel.alone for parcel in parcels])
        if attempt.outcome == "committed" or (attempt.outcome == "in_doubt" and self.doubts[-1]):
            self.published.append([parcel.place for parcel in parcels])
            self.offsets.append({partition: its.offset for partition, its in offsets.items()})
        return attempt

    async def resolve(self) -> bool | None:
        return self.doubts.pop(0)

    async def close(self) -> None:
        """Nothing is open."""

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        self.committing = True
        try:
            yield
        finally:
            self.committing = False

    def alone_now(self) -> Any:
        return self._alone()


class Group:
    def __init__(self, kafka: Kafka, ledger: OffsetLedger) -> None:
        self._kafka = kafka
        self._ledger = ledger

    def alone(self) -> Any:
        return self._kafka.alone_now()

    async def sealed(self, offsets: Mapping[TopicPartition, int]) -> tuple[Membership, Offsets] | None:
        if self._kafka.seal_errors:
            raise self._kafka.seal_errors.pop(0)
        members = self._kafka.members
        member = members.pop(0) if len(members) > 1 else members[0]
        if member is None:
            return None
        return member, {partition: OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}

    def note_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._ledger.note_committed(offsets)


class Parts:
    def __init__(self, *, timeout_s: float = 0.0, tiers: RetryTiers | None = None) -> None:
        self.kafka = Kafka()
        self.ledger = OffsetLedger()
        self.ledger.add(A, None)
        retries = RetryPolicy(tiers or RetryTiers())
        self.encoder = ResultEncoder(TOPICS, "group", 900_000, replica="one", retries=retries)
        self.concluded: list[tuple[int, str, bool]] = []
        self.loop = ReleaseLoop(
            HeldResults(self.ledger),
            self.kafka,  # type: ignore[arg-type]
            Group(self.kafka, self.ledger),
            Answers(self.encoder, self.kafka.partitions),
            Refusals(timeout_s=timeout_s),
            self.kafka,
            group="group",
            interval_s=0.0,
            hinder=self.kafka.told.append,
        )

    def replies(self, count: int, *, headers: JobHeaders | None = None, start: int = 0) -> list[Reply]:
        found = []
        for offset in range(start, start + count):
            record = Record(
                ticket=self.ledger.begin(A, offset),
                lane="bulk",
                key=None,
                value=b"{}",
                headers=(),
                timestamp_ms=0,
                timestamp_type=0,
                polled_at=0.0,
            )
            found.append(self.reply(record, headers or JobHeaders()))
        return found

    def reply(self, record: Record, headers: JobHeaders) -> Reply:
        failure = self.encoder.of_undeliverable(
            Reply(
                record=record,
                headers=headers,
                format="json",
                envelope=Envelope(id=record.name),
                outgoing=[],
                status="ok",
            ),
            ErrorBody.of("internal", "not asked"),
        )
        topic = headers.reply_topic or TOPICS.results
        outgoing = [
            type(one)(
                topic=topic, partition=headers.reply_partition, key=one.key, value=one.value, headers=[]
            )
            for one in failure.outgoing
        ]
        return Reply(
            record=record,
            headers=headers,
            format="json",
            envelope=Envelope(id=record.name),
            outgoing=outgoing,
            status="ok",
        )

    def conclude(self, reply: Reply, published: bool) -> None:
        self.ledger.finish(reply.record.ticket)
        self.concluded.append((reply.record.ticket.offset, reply.status, published))

    async def until(self, count: int, *replies: Iterable[Reply]) -> list[tuple[int, str, bool]]:
        """Hold these, and run until so many are concluded."""
        for some in replies:
            self.loop.hold(list(some), self.conclude)
        running = asyncio.create_task(self.loop.run())
        try:
            await wait_until(lambda: running.done() or len(self.concluded) >= count, what=f"{count} answers")
            assert not running.done(), running
        finally:
            running.cancel()
            await asyncio.wait({running})
        return self.concluded


async def test_what_is_held_is_published_with_the_offset_behind_it() -> None:
    parts = Parts()
    assert await parts.until(2, parts.replies(2)) == [(0, "ok", True), (1, "ok", True)]
    assert parts.kafka.offsets == [{A: 2}]


@pytest.mark.parametrize("outcome", ["failed", "fenced"])
async def test_a_transaction_that_was_undone_is_tried_again_as_it_was(outcome: Any) -> None:
    parts = Parts()
    undone = Attempt(outcome=outcome, error=KafkaConnectionError())
    parts.kafka.becomes = [lambda parcels: undone, lambda parcels: undone, committed]
    assert await parts.until(1, parts.replies(1)) == [(0, "ok", True)]
    assert len(parts.kafka.published) == 1
    assert parts.kafka.told[-1] is None, "ready again"
    assert (outcome == "failed") == any(parts.kafka.told)


@pytest.mark.parametrize(("took_place", "transactions"), [(True, 1), (False, 2)])
async def test_a_transaction_in_doubt_is_published_once_whatever_became_of_it(
    took_place: bool, transactions: int
) -> None:
    parts = Parts()
    parts.kafka.becomes = [lambda parcels: Attempt(outcome="in_doubt"), committed]
    parts.kafka.doubts = [None, took_place]
    assert await parts.until(1, parts.replies(1)) == [(0, "ok", True)]
    assert len(parts.kafka.published) == 1
    assert len(parts.kafka.alone) == transactions


async def test_nothing_is_published_while_the_brokers_do_not_say_which_topics_there_are() -> None:
    parts = Parts()
    parts.kafka.seal_errors = [KafkaConnectionError(), TimeoutError()]
    assert await parts.until(1, parts.replies(1)) == [(0, "ok", True)]
    assert parts.kafka.told[:2] == [
        "no transaction gets through (KafkaConnectionError)",
        "no transaction gets through (TimeoutError)",
    ]
    assert parts.kafka.told[-1] is None, "ready again"


async def test_nothing_is_published_during_a_rebalance() -> None:
    parts = Parts()
    parts.kafka.members = [None, None, Membership("me", 2)]
    await parts.until(1, parts.replies(1))
    assert len(parts.kafka.alone) == 1


async def test_the_answers_of_a_lost_partition_are_given_up_and_not_published() -> None:
    parts = Parts()
    replies = parts.replies(1)
    parts.ledger.drop([A])
    assert await parts.until(1, replies) == [(0, "ok", False)]
    assert parts.kafka.alone == []


async def test_answers_that_wait_for_another_one_are_given_up_once_their_partition_is_lost() -> None:
    parts = Parts()
    _, second = parts.replies(2)
    parts.loop.hold([second], parts.conclude)
    running = asyncio.create_task(parts.loop.run())
    try:
        await wait_until(lambda: not parts.loop._changed.is_set(), what="a look at what is held")
        parts.ledger.drop([A])
        await wait_until(lambda: parts.concluded == [(1, "ok", False)], what="the end of what is held")
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_a_record_that_is_refused_is_first_sent_alone() -> None:
    parts = Parts()
    parts.kafka.becomes = [refusing(MessageSizeTooLargeError(), TOPICS.results), committed]
    assert await parts.until(2, parts.replies(2)) == [(0, "ok", True), (1, "ok", True)]
    assert parts.kafka.alone == [[False, False], [True, True]]


async def test_one_that_is_refused_alone_becomes_an_error_and_a_dead_letter_beside_the_others() -> None:
    parts = Parts()
    parts.kafka.becomes = [refusing(MessageSizeTooLargeError(), "theirs")]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    concluded = await parts.until(2, guilty, parts.replies(1, start=1))
    assert concluded == [(0, "error", True), (1, "ok", True)]
    [places] = parts.kafka.published
    assert [topic for topic, _ in places] == [TOPICS.results, TOPICS.dead_letters, TOPICS.results]


async def test_an_address_that_takes_nothing_for_too_long_becomes_an_error() -> None:
    parts = Parts(timeout_s=0.0)
    parts.kafka.becomes = [refusing(NotEnoughReplicasError(), "theirs")]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    assert await parts.until(1, guilty) == [(0, "error", True)]


async def test_while_kafka_is_away_no_address_is_blamed() -> None:
    parts = Parts(timeout_s=0.0)
    parts.kafka.away = True
    parts.kafka.becomes = [*[refusing(NotEnoughReplicasError(), "theirs")] * 3, committed]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    assert await parts.until(1, guilty) == [(0, "ok", True)]


async def test_a_partition_of_our_own_topics_that_fails_is_left_for_another_one() -> None:
    parts = Parts(timeout_s=0.0)
    sick: set[tuple[str, int]] = set()

    def become(parcels: Sequence[Parcel]) -> Attempt:
        sick.update(parcel.place for parcel in parcels if not sick)
        reasons = [NotEnoughReplicasError() if parcel.place in sick else None for parcel in parcels]
        return Attempt(outcome="refused" if any(reasons) else "committed", reasons=reasons)

    parts.kafka.becomes = [become]
    assert await parts.until(1, parts.replies(1)) == [(0, "ok", True)]
    [[place]] = parts.kafka.published
    assert place not in sick


async def test_a_dead_letter_that_is_refused_goes_without_its_timestamp_then_bare_then_not_at_all() -> None:
    parts = Parts()
    parts.kafka.becomes = [
        refusing(MessageSizeTooLargeError(), "theirs"),
        refusing(MessageSizeTooLargeError(), "theirs"),
        *[refusing(MessageSizeTooLargeError(), TOPICS.dead_letters)] * 3,
        committed,
    ]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    assert await parts.until(1, guilty) == [(0, "error", True)]
    [places] = parts.kafka.published
    assert [topic for topic, _ in places] == [TOPICS.results]


# -- jobs that are run again -----------------------------------------------------------------------------------------------

TIERS = RetryTiers(tiers=(Tier(number=1, topic=TOPICS.retry(1), delay_s=30.0, partitions=3),))


async def test_a_job_whose_address_takes_nothing_goes_to_a_retry_topic_in_the_transaction_of_its_offset() -> (
    None
):
    parts = Parts(timeout_s=0.0, tiers=TIERS)
    parts.kafka.becomes = [refusing(NotEnoughReplicasError(), "theirs")]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    await parts.until(2, guilty, parts.replies(1, start=1))
    [places] = parts.kafka.published
    assert [topic for topic, _ in places] == [TOPICS.retry(1), TOPICS.results]
    assert parts.kafka.offsets == [{A: 2}]


@pytest.mark.parametrize(
    "error", [MessageSizeTooLargeError(), TopicAuthorizationFailedError(), NotEnoughReplicasError()]
)
async def test_a_job_that_its_retry_topic_does_not_take_is_answered_with_its_error(error: KafkaError) -> None:
    parts = Parts(timeout_s=0.0, tiers=TIERS)
    parts.kafka.becomes = [refusing(error, "theirs", TOPICS.retry(1))]
    guilty = parts.replies(1, headers=JobHeaders(reply_topic="theirs"))
    assert await parts.until(1, guilty) == [(0, "error", True)]
    [places] = parts.kafka.published
    assert [topic for topic, _ in places] == [TOPICS.results, TOPICS.dead_letters]


async def test_a_retry_topic_that_is_gone_stops_no_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_consumer.exactly_once.refusals.CONFIRM_S", 0.0)
    parts = Parts(timeout_s=60.0, tiers=TIERS)
    parts.kafka.becomes = [refusing(UnknownTopicOrPartitionError(), TOPICS.retry(1))]
    [reply] = parts.replies(1)
    error = parts.encoder.of_undeliverable(reply, ErrorBody.of("undeliverable", "expected an address"))
    again = parts.encoder.or_retry(error)
    assert again.retry is not None
    assert await parts.until(1, [again]) == [(0, "error", True)]
    [places] = parts.kafka.published
    assert [topic for topic, _ in places] == [TOPICS.results, TOPICS.dead_letters]
