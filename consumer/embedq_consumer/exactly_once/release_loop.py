"""The loop that publishes what is due, again and again: the bulk lane's answers, exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol

import structlog

from embedq_consumer.delivery.broker_errors import name_of
from embedq_consumer.delivery.result_records import Reply
from embedq_consumer.exactly_once.answers import Answers
from embedq_consumer.exactly_once.held_results import Concluded, Held, HeldResults, Release
from embedq_consumer.exactly_once.refusals import Refusals
from embedq_consumer.exactly_once.transactions import Attempt, Offsets, Parcel, Transactions
from embedq_shared.backoff import backoff
from embedq_shared.kafka import FencedMember, KafkaError, Membership, TopicPartition

log = structlog.get_logger()

_MAX_BYTES: Final = 16 * 1024 * 1024
"""Of one transaction: readers wait for its end, and an aborted one is sent again."""
_LOOK_S: Final = 0.5
"""Between two looks for partitions that were lost: a drain waits for what is held of them."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class Committing(Protocol):
    """How offsets are committed with a transaction instead of by themselves."""

    def alone(self) -> AbstractAsyncContextManager[None]:
        """No other offsets are committed inside."""

    async def sealed(self, offsets: Mapping[TopicPartition, int]) -> tuple[Membership, Offsets] | None:
        """These offsets as the group takes them, and who commits them; None while a rebalance is under way, or if they are
        of a topic that was made anew. Raises KafkaError or TimeoutError if that cannot be said now."""

    def note_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The group has them."""


class Topics(Protocol):
    """What topics there are."""

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic has, None for one that is not known."""


class Presence(Protocol):
    """Whether Kafka is there."""

    @property
    def away(self) -> bool:
        """Whether it takes nothing from us at all."""


class Kafka(Protocol):
    """What is known of the brokers."""

    @property
    def topics(self) -> Topics:
        """The topics when last seen."""

    @property
    def presence(self) -> Presence:
        """Whether they are there."""


class ReleaseLoop:
    """Holds complete answers and publishes them with their offsets, `interval_s` after the first at the earliest.

    Invariants:
        - One transaction at a time, and no other commit meanwhile: the group's offsets never go back.
        - Answers are concluded only once their transaction is known to be committed.
        - Release and member are taken in the same step: offsets of a partition that is lost after it are fenced.
    """

    # More than six parameters: the loop that ties the room's parts together.
    def __init__(
        self,
        held: HeldResults,
        transactions: Transactions,
        committing: Committing,
        answers: Answers,
        refusals: Refusals,
        kafka: Kafka,
        *,
        group: str,
        interval_s: float,
        hinder: Callable[[str | None], None],
    ) -> None:
        self._held = held
        self._transactions = transactions
        self._committing = committing
        self._answers = answers
        self._refusals = refusals
        self._kafka = kafka
        self._group = group
        self._interval_s = interval_s
        self._hinder = hinder
        self._changed = asyncio.Event()

    def hold(self, replies: Sequence[Reply], concluded: Concluded) -> None:
        """These are complete; `concluded` hears of each once."""
        self._held.hold([self._answers.of(reply, concluded) for reply in replies])
        self._changed.set()

    async def close(self) -> None:
        """Disconnect. What is held was not committed, and is repeated."""
        await self._transactions.close()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            with suppress(TimeoutError):  # an answer whose partition was lost brings no word of it
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
            await asyncio.sleep(self._interval_s)
            self._changed.clear()
            await self._publish_all()

    async def _publish_all(self) -> None:
        failures = 0
        while True:
            for lost in self._held.take_lost():
                lost.concluded(lost.reply, False)
            async with self._committing.alone():
                if (release := self._held.release(_MAX_BYTES)) is None:
                    return
                went_on = await self._publish(release)
            failures = 0 if went_on else failures + 1
            if failures:
                await asyncio.sleep(backoff(failures - 1, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))

    async def _publish(self, release: Release) -> bool:
        """One transaction; False if it is to be tried again after a pause."""
        try:
            sealed = await self._committing.sealed(release.offsets)
        except (KafkaError, TimeoutError) as error:
            self._tell(Attempt(outcome="failed", error=error))
            return False
        if sealed is None:
            return False
        membership, offsets = sealed
        member = FencedMember(group=self._group, membership=membership)
        parcels = list(self._parcels(release))
        attempt = await self._transactions.publish(parcels, offsets, member)
        committed = attempt.outcome == "committed"
        if attempt.outcome == "in_doubt":
            committed = await self._resolved()
        if committed:
            self._refusals.note_taken([parcel.place for parcel in parcels])
            self._committing.note_committed(release.offsets)
            self._held.published(release)
            self._hinder(None)
            for answer in release.answers:
                answer.concluded(answer.reply, True)
            return True
        self._tell(attempt)
        return attempt.outcome == "refused" and self._mend(release, parcels, attempt.reasons)

    def _parcels(self, release: Release) -> Iterator[Parcel]:
        for answer in release.answers:
            for record in answer.records:
                place = self._refusals.place_for(record, self._kafka.topics.partitions(record.topic) or 1)
                yield Parcel(record=record, place=place, alone=answer.alone)

    async def _resolved(self) -> bool:
        tries = 0
        while (committed := await self._transactions.resolve()) is None:
            self._hinder("a transaction's outcome is not known yet")
            await asyncio.sleep(backoff(tries, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
            tries += 1
        return committed

    def _tell(self, attempt: Attempt) -> None:
        if attempt.error is not None:
            log.warning("transaction_failed", outcome=attempt.outcome, reason=name_of(attempt.error))
            if attempt.outcome == "failed":
                self._hinder(f"no transaction gets through ({name_of(attempt.error)})")

    def _mend(
        self, release: Release, parcels: Sequence[Parcel], reasons: Sequence[KafkaError | None]
    ) -> bool:
        """Change the answers that were refused; False if all are to be tried as they are."""
        now = time.monotonic()
        if self._kafka.presence.away:
            self._refusals.forgive(now)
            return False
        self._refusals.note_taken(
            [p.place for p, reason in zip(parcels, reasons, strict=True) if reason is None]
        )
        mended: list[Held] = []
        rest = iter(zip(parcels, reasons, strict=True))
        for answer in release.answers:
            its = [next(rest) for _ in answer.records]
            found = self._judged(answer, [p for p, _ in its], [reason for _, reason in its], now)
            if found is not answer:
                mended.append(found)
        self._held.hold(mended)
        return bool(mended)

    def _judged(
        self, answer: Held, parcels: Sequence[Parcel], reasons: Sequence[KafkaError | None], now: float
    ) -> Held:
        reply = answer.reply
        # A record that cannot be run again has another way out, as one has whose caller's address fails.
        addressed = (
            reply.headers.reply_topic is not None
            or reply.headers.reply_partition is not None
            or reply.retry is not None
        )
        verdicts = [
            "published"
            if reason is None
            else self._refusals.judge(
                parcel.record,
                parcel.place,
                reason,
                now,
                addressed=addressed and index < answer.results,
                alone=answer.alone,
            )
            for index, (parcel, reason) in enumerate(zip(parcels, reasons, strict=True))
        ]
        final = [verdict if isinstance(verdict, KafkaError) else None for verdict in verdicts]
        if any(final):
            return self._answers.mend(answer, final)
        if "alone" in verdicts:
            return self._answers.apart(answer)
        return answer
