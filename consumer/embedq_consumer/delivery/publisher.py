"""Results to Kafka, acknowledged. The one place that owns a producer, and that replaces it when it breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from embedq_consumer.ending import ended
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.headers import Header

log = structlog.get_logger()

_REFUSED: Final = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    InvalidTopicError,
    UnknownTopicOrPartitionError,
)
"""What the broker says about the record itself: sending it again cannot help."""
Place = tuple[str, int | None]
"""A topic, and a partition of it or any."""

_TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
_MAX_BATCH_BYTES: Final = 1_000_000
_ATTEMPT_S: Final = 20.0
_CLOSE_S: Final = 5.0
_BACKOFF_S: Final = 0.2


class BrokerUnavailable(Exception):
    """The brokers took no record for `publish_timeout_s`; ending the process loses nothing, since nothing was committed."""


class TopicDirectory:
    """How many partitions each topic has. Asks for all topics at once, since asking for one by name can create it."""

    def __init__(self, *, min_age_s: float = 1.0) -> None:
        self._counts: dict[str, int] = {}
        self._min_age_s = min_age_s
        self._refreshed_at = -min_age_s
        self._lock = asyncio.Lock()

    def partitions(self, topic: str) -> int | None:
        """The number of partitions when last seen, None for an unknown topic."""
        return self._counts.get(topic)

    def forget(self, topic: str) -> None:
        """The broker says that it has no such topic: whoever names it again must ask."""
        self._counts.pop(topic, None)

    async def refresh(self, producer: AIOKafkaProducer, *, since: float) -> None:
        """Look again, unless somebody did after `since` (monotonic seconds); at most once in `min_age_s`."""
        async with self._lock:
            if self._refreshed_at > since:
                return
            await asyncio.sleep(max(0.0, self._refreshed_at + self._min_age_s - time.monotonic()))
            asked_at = time.monotonic()
            async with asyncio.timeout(_ATTEMPT_S):
                cluster = await producer.client.fetch_all_metadata()
            self._refreshed_at = asked_at  # only now: a look that failed must not pass for one
            self._counts = {
                topic: len(cluster.partitions_for_topic(topic) or ()) for topic in cluster.topics(False)
            }


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """One record to publish."""

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    timestamp_ms: int | None = None


class Publisher:
    """Publishes records and waits until the brokers have them.

    Invariants: one appender at a time (thousands of concurrent sends cost aiokafka quadratic wake-ups); every send is
    awaited; every wait has a deadline of ours, since an idempotent producer has none; a producer that failed in any way
    is replaced, since its sequence numbers may have a gap that the broker never forgives.
    """

    def __init__(
        self, options: dict[str, Any], metrics: Metrics, *, max_bytes: int, timeout_s: float
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._appending = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None
        self._generation = 0
        self.topics = TopicDirectory()

    async def open(self) -> None:
        """Connect, and learn the topics.

        Raises:
            KafkaError, TimeoutError: no broker answers.
        """
        producer = self._new()
        try:
            async with asyncio.timeout(_ATTEMPT_S):
                await producer.start()
        except BaseException:
            await _abandon(producer)
            raise
        self._producer = producer
        await self.refresh_topics()

    async def close(self) -> None:
        """Disconnect. Whatever was not acknowledged was not committed either."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _abandon(producer)

    async def refresh_topics(self) -> None:
        """See topics that were made since."""
        since = time.monotonic()
        deadline = since + self._timeout_s
        while True:
            try:
                await self.topics.refresh(self._live(), since=since)
                return
            except (KafkaError, TimeoutError, OSError) as error:
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(f"no broker answered for {self._timeout_s:g} s") from error
                await asyncio.sleep(_BACKOFF_S)

    async def publish(self, records: Sequence[Outgoing]) -> list[KafkaError | None]:
        """Send all, wait for all. For each record None, or why the broker will never take it.

        Raises:
            BrokerUnavailable: no acknowledgement within `timeout_s`.
        """
        outcomes: list[KafkaError | None] = [None] * len(records)
        open_ = list(range(len(records)))
        alone: set[int] = set()
        deadline = time.monotonic() + self._timeout_s
        while True:
            generation = self._generation
            again: list[int] = []
            reason: BaseException | None = None
            left = max(_BACKOFF_S, deadline - time.monotonic())
            for index, error in await self._attempt(records, open_, alone, min(_ATTEMPT_S, left)):
                reason = error
                if isinstance(error, UnknownTopicOrPartitionError):
                    self.topics.forget(records[index].topic)
                if (
                    isinstance(error, _TOO_LARGE)
                    and index not in alone
                    and _may_share_a_batch(records[index])
                ):
                    alone.add(index)
                    again.append(index)
                elif isinstance(error, _REFUSED):
                    outcomes[index] = error
                else:
                    again.append(index)
            acknowledged = [index for index in open_ if index not in again and outcomes[index] is None]
            self._metrics.results.inc(len(acknowledged))
            self._metrics.result_bytes.inc(sum(len(records[index].value or b"") for index in acknowledged))
            if reason is None:
                return outcomes
            if len(again) < len(open_):
                deadline = time.monotonic() + self._timeout_s
            elif time.monotonic() > deadline:
                raise BrokerUnavailable(f"no result was acknowledged for {self._timeout_s:g} s") from reason
            await self._replace(generation, reason)
            if not again:
                return outcomes
            open_ = again
            await asyncio.sleep(_BACKOFF_S)

    async def _attempt(
        self, records: Sequence[Outgoing], indices: list[int], alone: set[int], within: float
    ) -> list[tuple[int, BaseException]]:
        """One try of so many seconds at most: the records that failed, with the reason of each.

        Those in `alone` share no batch with others, since the broker judges a batch's size, not a record's.
        """
        failures: list[tuple[int, BaseException]] = []
        futures: dict[int, asyncio.Future[Any]] = {}
        try:
            async with asyncio.timeout(within):
                missing = await _missing(self._live(), {_place(records[index]) for index in indices})
                async with self._appending:
                    producer = self._live()
                    for index in indices:
                        record = records[index]
                        if _place(record) in missing:
                            failures.append((index, UnknownTopicOrPartitionError()))
                            continue
                        if index in alone:
                            await producer.flush()
                        try:
                            futures[index] = await producer.send(
                                record.topic,
                                value=record.value,
                                key=record.key,
                                partition=record.partition,
                                timestamp_ms=record.timestamp_ms,
                                headers=record.headers,
                            )
                        except _REFUSED as error:
                            failures.append((index, error))
                        else:
                            if index in alone:
                                await asyncio.wait([futures[index]])
                await asyncio.wait(futures.values()) if futures else None
        except (KafkaError, TimeoutError, OSError) as error:
            waiting = set(indices) - {index for index, _ in failures}
            failures += [
                (index, error) for index in waiting if index not in futures or not futures[index].done()
            ]
        for index, future in futures.items():
            if not future.done():
                future.cancel()
            elif future.cancelled():
                failures.append((index, KafkaError("the producer was closed")))
            elif (failure := future.exception()) is not None:
                failures.append((index, failure))
        return failures

    async def _replace(self, generation: int, reason: BaseException) -> None:
        """A new producer in place of the one of that generation, unless somebody has seen to it already."""
        async with self._appending:
            if generation != self._generation:
                return
            self._generation += 1
            self._metrics.producer_restarts.inc()
            log.warning("producer_replaced", reason=type(reason).__name__)
            broken, self._producer = self._producer, None
            if broken is not None:
                await _abandon(broken)
            producer = self._new()
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    await producer.start()
            except (KafkaError, TimeoutError, OSError):
                await _abandon(
                    producer
                )  # the next attempt fails at once, and replaces again until its deadline
                return
            self._producer = producer

    def _live(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise KafkaError("no producer is connected")
        return self._producer

    def _new(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **self._options,
            acks="all",
            enable_idempotence=True,
            linger_ms=1,
            max_batch_size=_MAX_BATCH_BYTES,
            max_request_size=self._max_bytes,
            request_timeout_ms=15_000,
        )


def _may_share_a_batch(record: Outgoing) -> bool:
    """Whether a batch that held it may have been refused because of others."""
    return len(record.value or b"") + len(record.key or b"") < _MAX_BATCH_BYTES


def _place(record: Outgoing) -> Place:
    return record.topic, record.partition


async def _missing(producer: AIOKafkaProducer, places: Iterable[Place]) -> set[Place]:
    """Those that the brokers do not have. Asked beforehand, since `send` would ask while others wait for their turn.

    A partition that the producer has not seen yet, of a topic that grew, it would only assert.
    """

    async def is_missing(topic: str, partition: int | None) -> bool:
        try:
            known = await producer.partitions_for(topic)
            if partition is None or partition in known:
                return False
            await producer.client.force_metadata_update()
            return partition not in await producer.partitions_for(topic)
        except UnknownTopicOrPartitionError:
            return True

    asked = list(places)
    found = await asyncio.gather(*(is_missing(*place) for place in asked))
    return {place for place, gone in zip(asked, found, strict=True) if gone}


async def _abandon(producer: AIOKafkaProducer) -> None:
    """Stop a producer without waiting for ever: with the broker gone, `stop` would."""
    if await ended(producer.stop(), _CLOSE_S) is None:
        return
    sender: asyncio.Task[None] | None = producer._sender.sender_task
    if sender is not None:
        # A stop that is cancelled leaves it running: it would connect again, and send what was given up long ago.
        sender.cancel()
    if problem := await ended(producer.client.close(), _CLOSE_S):
        log.warning("producer_left_open", reason=problem)
    if sender is not None:
        await asyncio.wait({sender}, timeout=_CLOSE_S)
