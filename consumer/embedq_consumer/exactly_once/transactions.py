"""Records and offsets to Kafka, in one transaction. The one place that owns the transactional producer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec
import structlog

from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_shared.kafka import FencedMember, KafkaError, MemberFenced, OffsetAndMetadata, TopicPartition

log = structlog.get_logger()

_UNREACHABLE: Final = (KafkaError, TimeoutError, OSError)

Offsets = Mapping[TopicPartition, OffsetAndMetadata]


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """One record and where it goes. `alone`: it shares no batch."""

    record: Outgoing
    place: Place
    alone: bool


class TransactionalProducer(Protocol):
    """What `Transactions` asks of a producer. Each method but `abandon` raises KafkaError or OSError if it cannot."""

    async def start(self) -> None:
        """Connect, and end what a producer of the same name left open: from here on that one is fenced."""

    async def look_up(self, places: Collection[Place]) -> Mapping[Place, KafkaError]:
        """Why some of these places cannot be written to."""

    async def begin(self) -> None:
        """Begin a transaction."""

    async def send(self, parcels: Sequence[Parcel], within: float) -> Sequence[KafkaError | None]:
        """Send all: for each None, or why the brokers have not taken it within this many seconds."""

    async def add_offsets(self, offsets: Offsets, member: FencedMember) -> None:
        """The offsets become the group's with this transaction; raises `MemberFenced` if the group has gone on."""

    async def commit(self) -> None:
        """Make it all visible."""

    async def abort(self) -> None:
        """Undo it all."""

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata | None]:
        """The group's offsets, once no open transaction can change them."""

    async def abandon(self) -> None:
        """Disconnect, within a bounded time and whatever the brokers do. Never raises."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one transaction.

    committed: all of it is visible. refused: none of it is, since the brokers do not take some records; `reasons` has the
    error of each. fenced: none of it is, since the group has gone on. failed: none of it is. in_doubt: `resolve` will say.
    """

    outcome: Literal["committed", "refused", "fenced", "failed", "in_doubt"]
    reasons: Sequence[KafkaError | None] = ()
    error: BaseException | None = None


class Transactions:
    """Publishes records and offsets, both or neither.

    Invariants:
        - Every send is awaited before the offsets are added: aiokafka commits a transaction whose send failed.
        - Every wait has a deadline of ours, `attempt_s`.
        - A producer that failed in a transaction is replaced: a batch that was not sent leaves a gap in its sequence that the
          brokers never forgive. The start of the next one ends its transaction.
        - Where it is not known whether a commit took place, a new producer of the same name ends that transaction first,
          and then the group's offsets say which it was. No other transaction begins before that is known.
    """

    def __init__(self, make_producer: Callable[[], TransactionalProducer], *, attempt_s: float) -> None:
        self._make_producer = make_producer
        self._attempt_s = attempt_s
        self._producer: TransactionalProducer | None = None
        self._in_doubt: tuple[Offsets, str] | None = None

    async def close(self) -> None:
        """Disconnect. A transaction that is open is undone by the brokers."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.abandon()

    async def publish(self, parcels: Sequence[Parcel], offsets: Offsets, member: FencedMember) -> Attempt:
        """One transaction with all of this."""
        if self._in_doubt is not None:
            raise RuntimeError("a transaction was begun while another one is in doubt. This is a bug.")
        try:
            producer = await self._ready()
            async with asyncio.timeout(self._attempt_s):
                missing = await producer.look_up({parcel.place for parcel in parcels})
            if missing:
                reasons = [missing.get(parcel.place) for parcel in parcels]
                return Attempt(outcome="refused", reasons=reasons)
            async with asyncio.timeout(2 * self._attempt_s):
                await producer.begin()
                reasons = list(await producer.send(parcels, self._attempt_s))
            if any(reason is not None for reason in reasons):
                await self.close()
                return Attempt(outcome="refused", reasons=reasons)
            async with asyncio.timeout(self._attempt_s):
                await producer.add_offsets(offsets, member)
        except MemberFenced as error:
            await self._abort()
            return Attempt(outcome="fenced", error=error)
        except _UNREACHABLE as error:
            await self.close()
            return Attempt(outcome="failed", error=error)
        return await self._commit(producer, offsets, member.group)

    async def _commit(self, producer: TransactionalProducer, offsets: Offsets, group: str) -> Attempt:
        self._in_doubt = offsets, group
        try:
            async with asyncio.timeout(self._attempt_s):
                await producer.commit()
        except _UNREACHABLE as error:
            log.warning("transaction_in_doubt", reason=type(error).__name__)
            await self.close()
            return Attempt(outcome="in_doubt", error=error)
        self._in_doubt = None
        return Attempt(outcome="committed")

    async def resolve(self) -> bool | None:
        """Whether the transaction in doubt was committed; None if the brokers do not say yet."""
        if self._in_doubt is None:
            raise RuntimeError("no transaction is in doubt. This is a bug.")
        offsets, group = self._in_doubt
        try:
            producer = await self._ready()
            async with asyncio.timeout(self._attempt_s):
                found = await producer.committed(group, offsets.keys())
        except _UNREACHABLE:
            await self.close()
            return None
        self._in_doubt = None
        # It committed all of its offsets or none. Whoever has the partitions by now began at them, or behind.
        return all(
            (stored := found.get(partition)) is not None and stored.offset >= its.offset
            for partition, its in offsets.items()
        )

    async def _ready(self) -> TransactionalProducer:
        if self._producer is None:
            producer = self._make_producer()
            try:
                async with asyncio.timeout(self._attempt_s):
                    await producer.start()
            except BaseException:
                await producer.abandon()
                raise
            self._producer = producer
        return self._producer

    async def _abort(self) -> None:
        """Undo the open transaction; where that fails, the next producer's start does it."""
        if self._producer is None:
            return
        try:
            async with asyncio.timeout(self._attempt_s):
                await self._producer.abort()
        except _UNREACHABLE:
            await self.close()
