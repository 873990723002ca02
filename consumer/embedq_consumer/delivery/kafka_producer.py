"""aiokafka's producer, as the publisher needs it. The only module that makes one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import structlog

from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.delivery.send_round import MAX_BATCH_BYTES
from embedq_shared.kafka import AIOKafkaProducer, UnknownTopicOrPartitionError, start_client, stop_client

log = structlog.get_logger()

_REQUEST_TIMEOUT_MS: Final = 15_000
"""Shorter than the publisher's longest try, so that the broker's own reason comes first."""
_LINGER_MS: Final = 1
_CLOSE_S: Final = 5.0


class Producer(Protocol):
    """What the publisher asks of a producer. Each method but `abandon` raises KafkaError or OSError if it cannot."""

    async def start(self) -> None:
        """Connect."""

    def send(self, record: Outgoing) -> Awaitable[asyncio.Future[Any]]:
        """Append one record; the future is done when the broker has it, or will not have it."""

    async def flush(self) -> None:
        """Wait until everything appended so far is acknowledged or failed."""

    async def is_missing(self, place: Place) -> bool:
        """Whether the brokers have no such topic, or not this partition of it."""

    async def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic, asked anew."""

    async def abandon(self) -> None:
        """Disconnect, within a bounded time and whatever the brokers do. Never raises."""


MakeProducer = Callable[[], Producer]


def producers(options: dict[str, Any], *, max_bytes: int) -> MakeProducer:
    """Makes idempotent producers from a client's connection options; `max_bytes` bounds one record."""

    def make() -> Producer:
        return KafkaProducer(
            AIOKafkaProducer(
                **options,
                acks="all",
                enable_idempotence=True,
                linger_ms=_LINGER_MS,
                max_batch_size=MAX_BATCH_BYTES,
                max_request_size=max_bytes,
                request_timeout_ms=_REQUEST_TIMEOUT_MS,
            )
        )

    return make


class KafkaProducer:
    """One of aiokafka's producers, with what it forgets or never ends handled here."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError, OSError: no broker answers.
        """
        await start_client(self._producer)

    def send(self, record: Outgoing) -> Awaitable[asyncio.Future[Any]]:
        """Append one record; the future is done when the broker has it, or will not have it."""
        sending: Awaitable[asyncio.Future[Any]] = self._producer.send(
            record.topic,
            value=record.value,
            key=record.key,
            partition=record.partition,
            timestamp_ms=record.timestamp_ms,
            headers=record.headers,
        )
        return sending

    async def flush(self) -> None:
        """Wait until everything appended so far is acknowledged or failed."""
        await self._producer.flush()

    async def is_missing(self, place: Place) -> bool:
        """Whether the brokers have no such topic, or not this partition of it.

        aiokafka would only assert a partition that it has not seen yet, of a topic that grew.
        """
        topic, partition = place
        try:
            known = await self._producer.partitions_for(topic)
            if partition is None or partition in known:
                return False
            await self._producer.client.force_metadata_update()
            return partition not in await self._producer.partitions_for(topic)
        except UnknownTopicOrPartitionError:
            return True

    async def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic, asked anew."""
        cluster = await self._producer.client.fetch_all_metadata()
        return {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in cluster.topics(False)}

    async def abandon(self) -> None:
        """Stop without waiting for ever: while the brokers are gone, aiokafka's `stop` would."""
        if problem := await stop_client(self._producer, _CLOSE_S):
            log.warning("producer_abandoned", reason=problem)
