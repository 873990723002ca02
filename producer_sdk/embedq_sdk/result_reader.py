"""Reading the results topic: parts joined, repeats dropped, nothing counted as read before it was taken."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from embedq_sdk.embeddings import (
    Embeddings,
    FinishedJob,
    PartJoiner,
    ReadFailure,
    ReadResult,
    assemble,
    job_failed,
    read_reply,
)
from embedq_sdk.errors import EmbedError, UnreadableReply
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics
from embedq_shared import topics as names

_REMEMBERED: Final = 100_000
_COMMIT_EVERY_S: Final = 1.0
_COMMIT_TIMEOUT_S: Final = 5.0
_POLL_MS: Final = 500


@dataclass(frozen=True, slots=True)
class JobResult:
    """One submitted job's end. Either `embeddings` or `error` is there.

    `embeddings.errors` has the inputs that failed alone. `id` is None where the service could not read one.
    """

    id: str | None
    embeddings: Embeddings | None
    error: EmbedError | None
    metadata: Any = None


@dataclass(slots=True)
class _OpenJob:
    """A job of which parts are missing, and where its first part lies."""

    joiner: PartJoiner = field(default_factory=PartJoiner)
    first: dict[int, int] = field(default_factory=dict)
    """Partition to offset."""


class ResultCollector:
    """Joins parts and drops repeats. Pure: offsets in, offsets out.

    A repeat is known by its id, among the last `remember` ids. `committable` never passes the first part of a job that
    is not whole yet, nor a result that was not taken.
    """

    def __init__(self, remember: int = _REMEMBERED) -> None:
        self._remember = remember
        self._done: OrderedDict[str, None] = OrderedDict()
        self._open: dict[str, _OpenJob] = {}
        self._next: dict[int, int] = {}
        self.repeats = 0

    def add(self, partition: int, offset: int, reply: ReadResult | ReadFailure) -> JobResult | None:
        """The job's result if this record makes it whole."""
        id = reply.id
        if id is not None and id in self._done:
            self._done.move_to_end(id)
            self.repeats += 1
            return None
        if isinstance(reply, ReadFailure):
            result = JobResult(id, None, job_failed(reply.error), reply.metadata)
        else:
            job = self._open.setdefault(reply.id, _OpenJob())
            job.first.setdefault(partition, offset)
            parts = job.joiner.add(reply)
            if parts is None:
                return None
            count = 1 + max(datum.index for part in parts for datum in part.data)
            result = JobResult(id, assemble([FinishedJob(count=count, outcome=parts)]), None, reply.metadata)
        if id is not None:
            self._open.pop(id, None)
            self._done[id] = None
            if len(self._done) > self._remember:
                self._done.popitem(last=False)
        return result

    def taken(self, partition: int, offset: int) -> None:
        """The record at `offset`, and what it made whole, needs no second reading."""
        self._next[partition] = offset + 1

    def committable(self) -> dict[int, int]:
        """For each partition the offset to go on from."""
        positions = dict(self._next)
        for job in self._open.values():
            for partition, offset in job.first.items():
                if partition in positions:
                    positions[partition] = min(positions[partition], offset)
        return positions

    def forget(self, partitions: Iterable[int]) -> None:
        """Partitions went to another reader, which starts at our last commit."""
        gone = set(partitions)
        for partition in gone:
            self._next.pop(partition, None)
        self._open = {id: job for id, job in self._open.items() if not gone & job.first.keys()}


class _OnRebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, collector: ResultCollector) -> None:
        self._collector = collector

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self._collector.forget(tp.partition for tp in revoked)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        pass


async def read_results(
    servers: KafkaConnection,
    topic: str,
    *,
    group: str | None,
    from_beginning: bool,
    connect_timeout: float,
    idle: float | None,
) -> AsyncGenerator[JobResult, None]:
    """Every result of `topic`; see `EmbedClient.results`."""
    settings: dict[str, Any] = {"fetch_max_wait_ms": _POLL_MS}
    if group is not None:
        settings |= {"group_id": group, "session_timeout_ms": 30_000, "rebalance_timeout_ms": 60_000}
    consumer = await servers.start(lambda: servers.consumer(**settings), connect_timeout)
    collector = ResultCollector()
    loop = asyncio.get_running_loop()
    try:
        await require_topics(servers, consumer, [topic], connect_timeout)
        if group is None:
            await servers.within(
                connect_timeout, "finding the results", _assign_all(consumer, topic, from_beginning)
            )
        else:
            consumer.subscribe([topic], listener=_OnRebalance(collector))
        last_news = last_commit = loop.time()
        while True:
            fetched = await consumer.getmany(timeout_ms=_POLL_MS)
            for tp, records in fetched.items():
                for record in records:
                    last_news = loop.time()
                    try:
                        reply = read_reply(record.value or b"", msgpack=_is_msgpack(record.headers))
                    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                        detail = f"{type(error).__name__} at {topic}-{tp.partition}, offset {record.offset}"
                        yield JobResult(None, None, UnreadableReply(detail=detail))
                    else:
                        result = collector.add(tp.partition, record.offset, reply)
                        if result is not None:
                            yield result
                    collector.taken(tp.partition, record.offset)
            if group is not None and loop.time() - last_commit >= _COMMIT_EVERY_S:
                await _commit(consumer, topic, collector)
                last_commit = loop.time()
            if idle is not None and loop.time() - last_news >= idle:
                return
    finally:
        if group is not None:
            await _commit(consumer, topic, collector)
        await close(consumer)


async def _assign_all(consumer: AIOKafkaConsumer, topic: str, from_beginning: bool) -> None:
    first = TopicPartition(topic, 0)
    consumer.assign([first])
    await consumer.position(first)  # brings the topic's metadata
    everything = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or {0})]
    consumer.assign(everything)
    if from_beginning:
        await consumer.seek_to_beginning(*everything)
    else:
        await consumer.seek_to_end(*everything)
    for tp in everything:
        await consumer.position(tp)


async def _commit(consumer: AIOKafkaConsumer, topic: str, collector: ResultCollector) -> None:
    """Best effort: what is not committed is read again, and at-least-once is the promise."""
    held = {tp.partition for tp in consumer.assignment()}
    offsets = {TopicPartition(topic, n): at for n, at in collector.committable().items() if n in held}
    if offsets:
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await consumer.commit(offsets)
        except (KafkaError, OSError, TimeoutError):
            return


def _is_msgpack(headers: Iterable[tuple[str, bytes]]) -> bool:
    kind = None
    for name, value in headers:
        if name == names.CONTENT_TYPE:
            kind = value
    return kind is not None and kind.decode("latin-1") in names.MSGPACK_TYPES
