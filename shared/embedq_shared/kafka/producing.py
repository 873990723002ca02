"""A producer whose partitions fail one by one: what aiokafka's own one does not let go of can be taken from it.

What aiokafka does by itself, and what is done about it here:

- An idempotent producer tries a batch again for ever. `evict` makes the batches of one partition fail, now or when their
  request is answered.
- While a batch is tried again, its broker gets nothing else for 0.1 s, and until metadata have come. With `retries=False`
  every failure is the caller's at once.
- It asks who leads a partition now only where it sends again: a producer without retries would be sent away by a former leader
  until its metadata are five minutes old. Here it asks after each failure that may pass.
- The broker answers a request when all of its partitions have enough copies, or after the time that the request allows,
  which aiokafka makes as long as the time for a connection that hangs. `ack_timeout_ms` is for the first alone.
- `send` waits for metadata, and for room in a batch, also while one is tried again, during which nothing else is appended.
  `append` never waits. And it makes a future for each record, with an answer of its own, where one for the batch says it all;
  it takes one record at a time, for each of which it asks what hour it is and which batch is open.
- Whoever asks for metadata while an answer is under way gets that answer, though it knows nothing of a topic named since.
- Every first record of a batch waits `linger_ms` for others, on an idle client in vain. Here it does so only where others came
  just before it (`Company`).
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    ProducerClosed,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from embedq_shared.kafka.clients import AIOKafkaProducer, PromptRequest, PromptSender

_FOLLOWS: Final = 2.0
"""Records that come within twice the time for which one would wait are likely to be followed within it."""


class Company:
    """Whether the first record of a batch waits for others: as long as others came just before. Pure: monotonic seconds.

    Records that are appended one after the other, in a turn of the event loop, came together: what the first does, all do. They
    are sent together in any case, and so is what comes while a request is under way.
    """

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._began = self._last = -math.inf
        self._followed = False

    def linger_s(self, now: float) -> float:
        """How long a record that comes `now` waits, if it is the first of its batch."""
        if now - self._began >= self._linger_s / 2:
            self._began, self._followed = now, now - self._last < _FOLLOWS * self._linger_s
        self._last = now
        return self._linger_s if self._followed else 0.0


class Appendable(Protocol):
    """A record, without the partition that it goes to."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> list[tuple[str, bytes]]: ...
    @property
    def timestamp_ms(self) -> int | None: ...


class Evicted(KafkaTimeoutError):  # type: ignore[misc]  # aiokafka has no type information
    """The batch was taken from the producer before the broker had it, or had answered."""


class BatchFull(KafkaTimeoutError):  # type: ignore[misc]
    """The partition's batch takes no more until it is sent. Nothing is wrong."""


# More than six parameters: aiokafka's own, which are passed on.
class PartitionwiseProducer(AIOKafkaProducer):
    """A producer of which each partition can be given up by itself.

    Args:
        retries: whether aiokafka sends again what failed for a reason that may pass.
        ack_timeout_ms: how long the broker may wait for the other copies of a record before it answers.
        options: of `AIOKafkaProducer`.
    """

    def __init__(self, *, retries: bool, ack_timeout_ms: int, **options: Any) -> None:
        super().__init__(**options)
        self._retries = retries
        self._company = Company(self._message_accumulator._linger_time)
        self._evicted: set[TopicPartition] = set()
        self._errors: dict[TopicPartition, tuple[float, Exception]] = {}
        self._sender.__class__ = _Sender
        self._sender.may_retry = self._may_retry
        self._sender._request_timeout_ms = ack_timeout_ms

    @property
    def alive(self) -> bool:
        """Whether it still sends. A producer that has started stops by itself after an error that it cannot handle."""
        task = self._sender.sender_task
        return task is not None and not task.done()

    def append(
        self, topic: str, partition: int, records: Sequence[Appendable]
    ) -> tuple[asyncio.Future[Any], int]:
        """Append the first of these records, at once, and of the others as many as go into the same batch. The future is done when
        the broker has them, or will not have them; the number says how many they are.

        Raises:
            MessageSizeTooLargeError: the first is larger than any request.
            BatchFull: more than `max_batch_size` waits to be sent.
            KafkaError: the producer has ended.
        """
        accumulator, place = self._message_accumulator, TopicPartition(topic, partition)
        self._check_size(records[0])
        if accumulator._closed:
            raise ProducerClosed
        if accumulator._exception is not None:
            raise copy.copy(accumulator._exception)
        accumulator._linger_time = self._company.linger_s(time.monotonic())
        waiting = accumulator._batches.get(place)
        # What waits to be tried again takes nothing more; aiokafka would let everything wait for it.
        if waiting and not waiting[-1]._builder.closed():
            batch = waiting[-1]
        else:
            batch = accumulator._append_batch(accumulator.create_builder(), place)
        if not (appended := self._fill(batch._builder, records)):
            if not accumulator._waiter_future.done():
                accumulator._waiter_future.set_result(None)
            raise BatchFull
        return batch.future, appended

    def _fill(self, builder: Any, records: Sequence[Appendable]) -> int:
        """Append what goes into the batch, past aiokafka's own layers, which are as dear as the work below them: how many went."""
        before = builder._relative_offset
        append = builder._builder.append
        # What shares a batch is no larger than one, and so than a request where that may be as large.
        fits = self._message_accumulator._batch_size <= self._max_request_size
        for offset, record in enumerate(records, before):
            if offset > before and not fits and self._size_of(record) > self._max_request_size:
                break  # it is the next call's first
            if append(offset, record.timestamp_ms, record.key, record.value, record.headers) is None:
                builder.close()
                break
            builder._relative_offset = offset + 1
        appended: int = builder._relative_offset - before
        return appended

    def _check_size(self, record: Appendable) -> None:
        if (size := self._size_of(record)) > self._max_request_size:
            raise MessageSizeTooLargeError(f"{size} bytes, where {self._max_request_size} may be sent")

    @staticmethod
    def _size_of(record: Appendable) -> int:
        size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(record.key, record.value, record.headers)
        return size

    def has_leader(self, topic: str, partition: int) -> bool:
        """Whether the brokers said last that this partition can be written to. False, too, if they were not asked."""
        leader: int | None = self.client.cluster.leader_for_partition(TopicPartition(topic, partition))
        return leader is not None and leader != -1

    async def look_up(self, topic: str, partition: int) -> None:
        """Ask the brokers about a partition.

        Raises:
            UnknownTopicOrPartitionError, TopicAuthorizationFailedError, LeaderNotAvailableError: it cannot be written to.
            KafkaConnectionError: no broker answers.
        """
        self.client._topics.add(topic)
        for _ in range(2):  # the first answer may have been under way, without this topic
            if not await self.client.force_metadata_update():
                raise KafkaConnectionError("no broker answered a question about topics")
            if self.has_leader(topic, partition):
                return
        cluster = self.client.cluster
        if topic in cluster.unauthorized_topics:
            raise TopicAuthorizationFailedError(topic)
        if partition not in (cluster.partitions_for_topic(topic) or ()):
            raise UnknownTopicOrPartitionError(topic)
        raise LeaderNotAvailableError(topic)

    def evict(self, topic: str, partition: int) -> None:
        """Fail this partition's batches with `Evicted`: those that wait now, and those under way when they would be tried
        again. An idempotent producer must not be given this partition any more: its sequence may have a gap.
        """
        place = TopicPartition(topic, partition)
        self._evicted.add(place)
        accumulator = self._message_accumulator
        for batch in accumulator._batches.pop(place, ()):
            if batch.retry_count:
                accumulator._pending_batches.add(batch)  # its end takes it out
            batch.failure(Evicted())
            batch._drain_waiter.exception()  # nobody waits, and asyncio must not complain about it

    def last_error(self, topic: str, partition: int, since: float) -> Exception | None:
        """Why a batch of this partition was tried again last, if that was after `since` (monotonic seconds)."""
        at, error = self._errors.get(TopicPartition(topic, partition), (0.0, None))
        return error if at >= since else None

    def forget(self, topic: str) -> None:
        """Ask about this topic no more."""
        self.client._topics.discard(topic)

    async def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic, asked anew.

        Raises:
            KafkaConnectionError: no broker answers.
        """
        try:
            cluster = await self.client.fetch_all_metadata()
        except KafkaError as error:
            raise KafkaConnectionError("no broker answered a question about topics") from error
        return {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in cluster.topics(False)}

    def _may_retry(self, place: TopicPartition, error: Exception) -> bool:
        self._errors[place] = (time.monotonic(), error)
        again = self._retries and place not in self._evicted
        if not again and getattr(error, "retriable", False):
            self.client.force_metadata_update()
        return again


class _Sender(PromptSender):
    """Asks before it sends a batch again."""

    may_retry: Any


class _ProduceRequest(PromptRequest):
    def _can_retry(self, error: Exception, batch: Any) -> bool:
        allowed = self._sender.may_retry(batch.tp, error)
        return bool(allowed and super()._can_retry(error, batch))


_Sender.request_kind = _ProduceRequest
