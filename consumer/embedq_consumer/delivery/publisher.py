"""Results to Kafka, acknowledged. The one place that owns a producer, and that replaces it when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog

from embedq_consumer.delivery.kafka_producer import MakeProducer, Producer
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.delivery.send_round import ATTEMPT_S, REFUSALS, SendRound
from embedq_consumer.delivery.topic_directory import TopicDirectory
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import KafkaError, UnknownTopicOrPartitionError

__all__ = ["BrokerUnavailable", "Outgoing", "Publisher"]

log = structlog.get_logger()

_UNREACHABLE: Final = (KafkaError, TimeoutError, OSError)
"""The producer or the brokers failed, as opposed to this program."""
_BACKOFF_S: Final = 0.2


class BrokerUnavailable(Exception):
    """The brokers took no record for `publish_timeout_s`.

    Ending the process loses nothing, since nothing was committed.
    """


class Publisher:
    """Publishes records and waits until the brokers have them. Which are sent again is decided in `SendRound`.

    Invariants:

    - One appender at a time: thousands of concurrent sends cost aiokafka quadratic wake-ups.
    - Every send is awaited, and every wait has a deadline of ours, since an idempotent producer has none.
    - A producer that failed in any way is replaced, since its sequence numbers may have a gap that the broker never
      forgives.
    """

    def __init__(
        self,
        make_producer: MakeProducer,
        metrics: Metrics,
        *,
        timeout_s: float,
        backoff_s: float = _BACKOFF_S,
        topics: TopicDirectory | None = None,
    ) -> None:
        self._make_producer = make_producer
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._appending = asyncio.Lock()
        self._producer: Producer | None = None
        self._generation = 0
        self.topics = topics or TopicDirectory()

    async def open(self) -> None:
        """Connect, and learn the topics.

        Raises:
            KafkaError, TimeoutError: no broker answers.
        """
        self._producer = await self._connected()
        await self.refresh_topics()

    async def close(self) -> None:
        """Disconnect. What was not acknowledged was not committed either."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.abandon()

    async def refresh_topics(self) -> None:
        """See topics that were made since.

        Raises:
            BrokerUnavailable: no broker answered within `timeout_s`.
        """
        since = time.monotonic()
        deadline = since + self._timeout_s
        while True:
            try:
                await self.topics.refresh(self._live(), since=since)
                return
            except _UNREACHABLE as error:
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(f"no broker answered for {self._timeout_s:g} s") from error
                await asyncio.sleep(self._backoff_s)

    async def publish(self, records: Sequence[Outgoing]) -> list[KafkaError | None]:
        """Send all, wait for all. For each record None, or why the broker will never take it.

        Raises:
            BrokerUnavailable: no acknowledgement within `timeout_s`.
        """
        sends = SendRound(records, timeout_s=self._timeout_s, now=time.monotonic())
        while True:
            generation = self._generation
            failures = await self._attempt(records, sends)
            tried = sends.tried(failures, time.monotonic())
            self._metrics.results.inc(len(tried.acknowledged))
            self._metrics.result_bytes.inc(
                sum(len(records[index].value or b"") for index in tried.acknowledged)
            )
            for topic in tried.unknown_topics:
                self.topics.forget(topic)
            if tried.reason is None:
                return sends.outcomes
            if tried.overdue:
                raise BrokerUnavailable(
                    f"no result was acknowledged for {self._timeout_s:g} s"
                ) from tried.reason
            await self._replace(generation, tried.reason)
            if not sends.pending:
                return sends.outcomes
            await asyncio.sleep(self._backoff_s)

    async def _attempt(self, records: Sequence[Outgoing], sends: SendRound) -> dict[int, BaseException]:
        """Try each pending record once, for `attempt_s` at most: the failures."""
        sent: dict[int, asyncio.Future[Any]] = {}
        interruption: BaseException | None = None
        try:
            async with asyncio.timeout(sends.attempt_s(time.monotonic())):
                places = {records[index].place for index in sends.pending}
                missing = await _missing(self._live(), places)
                async with self._appending:
                    await self._append(records, sends, missing, sent)
                if sent:
                    await asyncio.wait(sent.values())
        except _UNREACHABLE as error:
            interruption = error
        return _failures(sends.pending, sent, interruption)

    async def _append(
        self,
        records: Sequence[Outgoing],
        sends: SendRound,
        missing: set[Place],
        sent: dict[int, asyncio.Future[Any]],
    ) -> None:
        """Hand each pending record to the producer, in order, and its future to `sent` at once."""
        producer = self._live()
        for index in sends.pending:
            record = records[index]
            if missing and record.place in missing:
                sent[index] = _failed(UnknownTopicOrPartitionError())
                continue
            alone = sends.is_alone(index)
            if alone:
                await producer.flush()
            try:
                sent[index] = await producer.send(record)
            except REFUSALS as error:
                sent[index] = _failed(error)
            if alone:
                await asyncio.wait([sent[index]])

    async def _replace(self, generation: int, reason: BaseException) -> None:
        """A new producer in place of the one of that generation, unless another caller has replaced it already."""
        async with self._appending:
            if generation != self._generation:
                return
            self._generation += 1
            self._metrics.producer_restarts.inc()
            log.warning("producer_replaced", reason=type(reason).__name__)
            await self.close()
            with contextlib.suppress(*_UNREACHABLE):
                # Without one the next attempt fails at once, and replaces again until its deadline.
                self._producer = await self._connected()

    async def _connected(self) -> Producer:
        producer = self._make_producer()
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await producer.start()
        except BaseException:
            await producer.abandon()
            raise
        return producer

    def _live(self) -> Producer:
        if self._producer is None:
            raise KafkaError("no producer is connected")
        return self._producer


def _failures(
    pending: Sequence[int],
    sent: Mapping[int, asyncio.Future[Any]],
    interruption: BaseException | None,
) -> dict[int, BaseException]:
    """Why each record failed that did. What an interruption left open has failed by it, and is given up."""
    failures: dict[int, BaseException] = {}
    for index in pending:
        sending = sent.get(index)
        if sending is None or not sending.done():
            if interruption is None:
                raise RuntimeError("a try ended before every record was done. This is a bug.")
            failures[index] = interruption
            if sending is not None:
                sending.cancel()
        elif sending.cancelled():
            failures[index] = KafkaError("the producer was closed")
        elif (failure := sending.exception()) is not None:
            failures[index] = failure
    return failures


def _failed(error: KafkaError) -> asyncio.Future[Any]:
    """What `send` would have returned, had it not raised at once."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


async def _missing(producer: Producer, places: set[Place]) -> set[Place]:
    """Those that the brokers do not have. Asked beforehand, since `send` would ask while others wait for their turn."""
    asked = list(places)
    missing = await asyncio.gather(*(producer.is_missing(place) for place in asked))
    return {place for place, gone in zip(asked, missing, strict=True) if gone}
