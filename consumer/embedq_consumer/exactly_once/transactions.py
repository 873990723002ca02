"""Records and offsets to Kafka, in one transaction. The one place that owns the transactional producer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec
import structlog

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_shared.kafka import KafkaError, TopicPartition
from embedq_shared.kafka.transactions import Generation, MemberFenced

log = structlog.get_logger()

_UNREACHABLE: Final = (KafkaError, TimeoutError, OSError)


class TransactionalProducer(Protocol):
    """What `Transactions` asks of a producer. Each method but `abandon` raises KafkaError or OSError if it cannot."""

    async def start(self) -> None:
        """Connect, and end what a producer of the same name left open: from here on that one is fenced."""

    async def begin(self) -> None:
        """Begin a transaction."""

    async def send(self, records: Sequence[Outgoing]) -> Sequence[KafkaError | None]:
        """Send all and wait for all: for each None, or why the brokers do not take it."""

    async def add_offsets(self, offsets: Mapping[TopicPartition, int], member: Generation) -> None:
        """The offsets become the group's with this transaction; raises `MemberFenced` if the group has gone on."""

    async def commit(self) -> None:
        """Make it all visible."""

    async def abort(self) -> None:
        """Undo it all."""

    async def committed(
        self, group: str, partitions: Sequence[TopicPartition]
    ) -> Mapping[TopicPartition, int | None]:
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
        - Every wait has a deadline of ours.
        - Where it is not known whether a commit took place, a new producer of the same name ends that transaction first,
          and then the group's offsets say which it was. No other transaction begins before that is known.
    """

    def __init__(self, make_producer: Callable[[], TransactionalProducer], *, attempt_s: float) -> None:
        self._make_producer = make_producer
        self._attempt_s = attempt_s
        self._producer: TransactionalProducer | None = None
        self._in_doubt: tuple[Mapping[TopicPartition, int], str] | None = None

    async def close(self) -> None:
        """Disconnect. A transaction that is open is undone by the brokers."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.abandon()

    async def publish(
        self, records: Sequence[Outgoing], offsets: Mapping[TopicPartition, int], member: Generation
    ) -> Attempt:
        """One transaction with all of this."""
        if self._in_doubt is not None:
            raise RuntimeError("a transaction was begun while another one is in doubt. This is a bug.")
        try:
            producer = await self._ready()
        except _UNREACHABLE as error:
            return Attempt(outcome="failed", error=error)
        try:
            async with asyncio.timeout(self._attempt_s):
                await producer.begin()
                reasons = await producer.send(records)
        except _UNREACHABLE as error:
            await self.close()
            return Attempt(outcome="failed", error=error)
        if any(reason is not None for reason in reasons):
            await self._abort(producer)
            return Attempt(outcome="refused", reasons=reasons)
        try:
            async with asyncio.timeout(self._attempt_s):
                await producer.add_offsets(offsets, member)
        except MemberFenced as error:
            await self._abort(producer)
            return Attempt(outcome="fenced", error=error)
        except _UNREACHABLE as error:
            await self.close()
            return Attempt(outcome="failed", error=error)
        self._in_doubt = offsets, member.group
        try:
            async with asyncio.timeout(self._attempt_s):
                await producer.commit()
        except _UNREACHABLE as error:
            log.warning("transaction_in_doubt", reason=type(error).__name__)
            await self.close()
            return Attempt(outcome="in_doubt", error=error)
        self._in_doubt = None
        return Attempt(outcome="committed")

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

    async def resolve(self) -> bool | None:
        """Whether the transaction in doubt was committed; None if the brokers do not say yet."""
        if self._in_doubt is None:
            raise RuntimeError("no transaction is in doubt. This is a bug.")
        offsets, group = self._in_doubt
        try:
            producer = await self._ready()
            async with asyncio.timeout(self._attempt_s):
                found = await producer.committed(group, list(offsets))
        except _UNREACHABLE:
            await self.close()
            return None
        self._in_doubt = None
        # It committed all of its offsets or none, and nobody else commits these before the producer's start ended it.
        return all((found.get(partition) or 0) >= offset for partition, offset in offsets.items())

    async def _abort(self, producer: TransactionalProducer) -> None:
        """Undo the open transaction; where that fails, the next producer's start does it."""
        try:
            async with asyncio.timeout(self._attempt_s):
                await producer.abort()
        except _UNREACHABLE:
            await self.close()
