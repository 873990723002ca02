"""aiokafka's transactional producer, as `Transactions` needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.exactly_once.transactions import TransactionalProducer
from embedq_shared.kafka import KafkaError, TopicPartition, stop_client
from embedq_shared.kafka.transactions import FencedProducer, Generation, stable_offsets

log = structlog.get_logger()

_CLOSE_S: Final = 5.0
_LINGER_MS: Final = 1
_MAX_BATCH_BYTES: Final = 1_000_000
"""Of the records that the producer sends to a partition at once."""


def transactional_producers(
    options: Mapping[str, Any], name: str, *, timeout_ms: int, max_bytes: int
) -> Callable[[], TransactionalProducer]:
    """Makes producers of this transactional name, each of which fences the one before.

    `timeout_ms` is how long the brokers leave a transaction open whose producer has died, and readers wait.
    """

    def make() -> TransactionalProducer:
        return KafkaTransactions(
            FencedProducer(
                **options,
                transactional_id=name,
                transaction_timeout_ms=timeout_ms,
                acks="all",
                linger_ms=_LINGER_MS,
                max_batch_size=_MAX_BATCH_BYTES,
                max_request_size=max_bytes,
            )
        )

    return make


class KafkaTransactions:
    """One transactional producer."""

    def __init__(self, producer: FencedProducer) -> None:
        self._producer = producer

    async def start(self) -> None:
        """Connect, and fence the producers of this name before."""
        await self._producer.start()

    async def begin(self) -> None:
        """Begin a transaction."""
        await self._producer.begin_transaction()

    async def send(self, records: Sequence[Outgoing]) -> Sequence[KafkaError | None]:
        """Send all and wait for all."""
        sent: list[asyncio.Future[Any] | KafkaError] = [await self._send(record) for record in records]
        futures = [one for one in sent if isinstance(one, asyncio.Future)]
        if futures:
            await asyncio.wait(futures)
        return [one if isinstance(one, KafkaError) else _reason(one) for one in sent]

    async def _send(self, record: Outgoing) -> asyncio.Future[Any] | KafkaError:
        try:
            future: asyncio.Future[Any] = await self._producer.send(
                record.topic,
                value=record.value,
                key=record.key,
                partition=record.partition,
                timestamp_ms=record.timestamp_ms,
                headers=record.headers,
            )
        except KafkaError as error:
            return error
        return future

    async def add_offsets(self, offsets: Mapping[TopicPartition, int], member: Generation) -> None:
        """The offsets become the group's with this transaction."""
        self._producer.member = member
        await self._producer.send_offsets_to_transaction(dict(offsets), member.group)

    async def commit(self) -> None:
        """Make it all visible."""
        await self._producer.commit_transaction()

    async def abort(self) -> None:
        """Undo it all."""
        await self._producer.abort_transaction()

    async def committed(
        self, group: str, partitions: Sequence[TopicPartition]
    ) -> Mapping[TopicPartition, int | None]:
        """The group's offsets, once no open transaction can change them."""
        return await stable_offsets(self._producer.client, group, partitions)

    async def abandon(self) -> None:
        """Disconnect, whatever the brokers do."""
        if problem := await stop_client(self._producer, _CLOSE_S):
            log.warning("producer_abandoned", reason=problem)


def _reason(sent: asyncio.Future[Any]) -> KafkaError | None:
    if sent.cancelled():
        return KafkaError("the producer was closed")
    failure = sent.exception()
    if failure is None or isinstance(failure, KafkaError):
        return failure
    raise failure
