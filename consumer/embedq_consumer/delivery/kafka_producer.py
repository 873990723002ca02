"""aiokafka's producer, as the publisher needs it. The only module that makes one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import structlog

from embedq_consumer.delivery.destination import MAX_BATCH_BYTES
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_shared.kafka import KafkaConnectionError, PartitionwiseProducer, connect, stop_client

log = structlog.get_logger()

_CONNECT_S: Final = 10.0
"""One try, in which the client itself tries several times."""
_LOOK_UP_S: Final = 10.0
_LINGER_MS: Final = 1
_CLOSE_S: Final = 5.0
_COMMON_ACK_MS: Final = 1_000
"""All records of a request wait for its slowest partition, so that one which is slow must not make the others so. What was
not on every copy in time is sent again, and the broker knows that it has it."""
_COMMON_REQUEST_MS: Final = 10_000
"""For a connection that hangs."""
_APART_ACK_MS: Final = 5_000
"""There only places wait that have failed before; a broker that is asked again would write the record twice."""
_APART_REQUEST_MS: Final = 6_000


class Producer(Protocol):
    """What the publisher asks of a producer."""

    @property
    def alive(self) -> bool:
        """Whether it still sends."""

    async def start(self) -> None:
        """Connect. Raises KafkaError or OSError if no broker answers."""

    def send(self, place: Place, records: Sequence[Outgoing]) -> tuple[asyncio.Future[Any], int]:
        """Append the first of these records, and of the others as many as go into the same batch: how many. The future is done
        when the broker has them, or will not have them. Raises KafkaError, of the first."""

    def has_leader(self, place: Place) -> bool:
        """Whether the brokers said last that this place can be written to."""

    async def look_up(self, place: Place) -> None:
        """Ask the brokers about a place. Raises KafkaError, TimeoutError or OSError if it cannot be written to."""

    def evict(self, place: Place) -> None:
        """Fail what it has of this place."""

    def last_error(self, place: Place, since: float) -> Exception | None:
        """What the brokers said of this place last, if that was after `since` (monotonic seconds)."""

    def forget(self, topic: str) -> None:
        """Ask about this topic no more."""

    async def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic, asked anew. Raises KafkaError if no broker answers."""

    async def abandon(self) -> None:
        """Disconnect, within a bounded time and whatever the brokers do. Never raises."""


class MakeProducers(Protocol):
    """Makes producers of both kinds, not connected yet."""

    def common(self) -> Producer:
        """For all places that work: idempotent, so that what it sends again arrives once."""

    def apart(self) -> Producer:
        """For places that failed: it sends nothing again by itself, and no failure of one batch spoils the next."""


class KafkaProducers:
    """Makes producers from a client's connection options; `max_bytes` bounds one record."""

    def __init__(self, options: dict[str, Any], *, max_bytes: int) -> None:
        self._options = options | {
            "acks": "all",
            "linger_ms": _LINGER_MS,
            "max_batch_size": MAX_BATCH_BYTES,
            "max_request_size": max_bytes,
        }

    def common(self) -> Producer:
        """For all places that work."""
        return KafkaProducer(
            lambda: PartitionwiseProducer(
                **self._options,
                retries=True,
                ack_timeout_ms=_COMMON_ACK_MS,
                enable_idempotence=True,
                request_timeout_ms=_COMMON_REQUEST_MS,
            )
        )

    def apart(self) -> Producer:
        """For places that failed."""
        return KafkaProducer(
            lambda: PartitionwiseProducer(
                **self._options,
                retries=False,
                ack_timeout_ms=_APART_ACK_MS,
                enable_idempotence=False,
                request_timeout_ms=_APART_REQUEST_MS,
            )
        )


class KafkaProducer:
    """One of aiokafka's producers, with what it forgets or never ends handled here."""

    def __init__(self, make: Callable[[], PartitionwiseProducer]) -> None:
        self._make = make
        self._connected: PartitionwiseProducer | None = None
        self._abandoned = False

    @property
    def alive(self) -> bool:
        """Whether it still sends."""
        return self._connected is not None and self._connected.alive

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: no broker lets us in.
        """
        self._connected = await connect(self._make, _CONNECT_S)

    def send(self, place: Place, records: Sequence[Outgoing]) -> tuple[asyncio.Future[Any], int]:
        """Append the first of these records, and of the others as many as go into the same batch: how many. The future is done
        when the broker has them, or will not have them.

        Raises:
            KafkaError: this producer will not take the first.
        """
        return self._producer.append(*place, records)

    def has_leader(self, place: Place) -> bool:
        """Whether the brokers said last that this place can be written to."""
        return self._producer.has_leader(*place)

    async def look_up(self, place: Place) -> None:
        """Ask the brokers about a place.

        Raises:
            KafkaError, TimeoutError: it cannot be written to.
        """
        async with asyncio.timeout(_LOOK_UP_S):
            await self._producer.look_up(*place)

    def evict(self, place: Place) -> None:
        """Fail what it has of this place."""
        self._producer.evict(*place)

    def last_error(self, place: Place, since: float) -> Exception | None:
        """What the brokers said of this place last, if that was after `since`."""
        return self._producer.last_error(*place, since)

    def forget(self, topic: str) -> None:
        """Ask about this topic no more."""
        self._producer.forget(topic)

    async def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic, asked anew.

        Raises:
            KafkaError: no broker answers.
        """
        return await self._producer.partition_counts()

    async def abandon(self) -> None:
        """Stop without waiting for ever: while the brokers are gone, aiokafka's `stop` would."""
        producer, self._connected, self._abandoned = self._connected, None, True
        if producer is not None and (problem := await stop_client(producer, _CLOSE_S)):
            log.warning("producer_abandoned", reason=problem)

    @property
    def _producer(self) -> PartitionwiseProducer:
        if self._abandoned:  # while somebody waited to ask it
            raise KafkaConnectionError("the producer was closed")
        if self._connected is None:
            raise RuntimeError("the producer is not connected. This is a bug.")
        return self._connected
