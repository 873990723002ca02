"""Reading the results topic: parts joined, repeats dropped, nothing committed before its reader asked for more."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final

import numpy.typing as npt

from embedq_sdk.embeddings import (
    Embeddings,
    FinishedJob,
    PartJoiner,
    ReadFailure,
    ReadResult,
    Vectors,
    as_array,
    assemble,
    job_failed,
)
from embedq_sdk.errors import EmbedError, UnreadableReply
from embedq_sdk.reply_checks import Asked, BadReply, check_whole, read_checked
from embedq_sdk.shown import Shown
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics
from embedq_sdk.transport.silence import Silence
from embedq_shared import topics as names
from embedq_shared.headers import value_of
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    ConsumerRebalanceListener,
    KafkaError,
    Polled,
    TopicPartition,
    UnreadableRecord,
    poll,
)

_REMEMBERED: Final = 100_000
"""Ids of finished jobs that repeats are known by; about 17 MB."""
_COMMIT_EVERY_S: Final = 1.0
_COMMIT_TIMEOUT_S: Final = 5.0
_POLL_MS: Final = 500
_TURN_S: Final = 2 * _POLL_MS / 1000
"""A poll takes no longer in an event loop that runs."""
_SESSION_TIMEOUT_MS: Final = 30_000
_REBALANCE_TIMEOUT_MS: Final = 60_000
_LONGEST_GAP: Final = 100_000
"""Records of a partition within which a job's parts must come: the service sends them together."""
_MOST_HELD_BYTES: Final = 256 << 20
"""Of parts whose jobs are not complete: some hundred results of the largest size."""
_UNKNOWN: Final = Asked()


class JobResult(Shown, frozen=True, kw_only=True, eq=False):
    """The outcome of one submitted job: either `embeddings` or `error` is set.

    `embeddings.errors` has the inputs that failed on their own. `id` is None if the record names no job that could be
    read.
    """

    id: str | None
    embeddings: Embeddings | None
    error: EmbedError | None
    metadata: Any = None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Vectors:
        """The vectors.

        Raises:
            EmbedError: there are none, for this reason.
        """
        if self.embeddings is None:
            raise self.error or EmbedError()
        return as_array(self.embeddings.vectors, dtype, copy)


class _OpenJob:
    """A job some of whose parts are missing, the offset of its first part in each partition, and the parts' bytes."""

    __slots__ = ("first", "joiner", "size")

    def __init__(self) -> None:
        self.joiner = PartJoiner()
        self.first: dict[int, int] = {}
        self.size = 0


class ResultCollector:
    """Joins parts and drops repeats. Pure: offsets in, offsets out.

    Invariants:
        - A job's result is given out once, as long as its id is among the last `remember` ids.
        - `committable` never passes the first part of a job some of whose parts are missing, until it is given up: when
          they have not come within 100,000 records, or parts of such jobs take more than `most_bytes`.
        - `committable` never passes a result that its reader has not `taken`.
    """

    def __init__(self, remember: int = _REMEMBERED, most_bytes: int = _MOST_HELD_BYTES) -> None:
        self._remember = remember
        self._most_bytes = most_bytes
        self._done: OrderedDict[str, None] = OrderedDict()
        self._open: dict[str, _OpenJob] = {}
        self._held = 0
        self._next: dict[int, int] = {}
        self.repeats = 0

    def add(
        self, partition: int, offset: int, reply: ReadResult | ReadFailure, size: int = 0
    ) -> JobResult | None:
        """The job's result, if this record of `size` bytes is the last part of it that was missing.

        Raises:
            BadReply: the parts make no result. They are forgotten.
        """
        id = reply.id
        if id is not None and id in self._done:
            self._done.move_to_end(id)
            self.repeats += 1
            return None
        if isinstance(reply, ReadFailure):
            result = JobResult(id=id, embeddings=None, error=job_failed(reply.error), metadata=reply.metadata)
        else:
            job = self._open.setdefault(reply.id, _OpenJob())
            job.first.setdefault(partition, offset)
            parts = job.joiner.add(reply)
            if parts is None:
                job.size += size
                self._held += size
                return self._give_up(partition, offset)
            self._close(reply.id)
            check_whole(parts, _UNKNOWN)
            count = 1 + parts[-1].data[-1].index
            embeddings = assemble([FinishedJob(count=count, outcome=parts)])
            result = JobResult(id=id, embeddings=embeddings, error=None, metadata=reply.metadata)
        if id is not None:
            self._close(id)
            self._done[id] = None
            if len(self._done) > self._remember:
                self._done.popitem(last=False)
        return result

    def _give_up(self, partition: int, offset: int) -> JobResult | None:
        """The oldest job that waits for parts, as an error, if it must not wait any longer."""
        id, oldest = next(iter(self._open.items()))
        is_late = offset - oldest.first.get(partition, offset) > _LONGEST_GAP
        if not is_late and self._held <= self._most_bytes:
            return None
        self._close(id)
        return JobResult(
            id=id,
            embeddings=None,
            error=UnreadableReply(detail="parts of a result whose other parts never came"),
        )

    def _close(self, id: str) -> None:
        if (job := self._open.pop(id, None)) is not None:
            self._held -= job.size

    def taken(self, partition: int, offset: int) -> None:
        """The reader is done with the record at `offset`, and with the result that it completed."""
        self._next[partition] = offset + 1

    def committable(self) -> dict[int, int]:
        """The offset to commit for each partition: the first record that must be read again after a restart."""
        positions = dict(self._next)
        for job in self._open.values():
            for partition, offset in job.first.items():
                if partition in positions:
                    positions[partition] = min(positions[partition], offset)
        return positions

    def forget(self, partitions: Iterable[int]) -> None:
        """The partitions were given to another reader, which starts at our last commit."""
        gone = set(partitions)
        for partition in gone:
            self._next.pop(partition, None)
        for id in [id for id, job in self._open.items() if gone & job.first.keys()]:
            self._close(id)


class _OnRebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, collector: ResultCollector) -> None:
        self._collector = collector

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self._collector.forget(tp.partition for tp in revoked)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        pass


async def read_results(
    connection: KafkaConnection,
    topic: str,
    *,
    group: str | None,
    from_beginning: bool,
    connect_timeout: float,
    idle: float | None,
) -> AsyncGenerator[JobResult, None]:
    """Every result of `topic`; see `EmbedClient.results`."""
    # A service that delivers exactly once publishes in transactions: what one of them undid is no result.
    settings: dict[str, Any] = {"fetch_max_wait_ms": _POLL_MS, "isolation_level": "read_committed"}
    if group is not None:
        settings |= {
            "group_id": group,
            "session_timeout_ms": _SESSION_TIMEOUT_MS,
            "rebalance_timeout_ms": _REBALANCE_TIMEOUT_MS,
        }
    consumer = await connection.connect(lambda: connection.consumer(**settings), connect_timeout)
    collector = ResultCollector()
    loop = asyncio.get_running_loop()
    try:
        await require_topics(connection, consumer, [topic], connect_timeout)
        if group is None:
            await connection.call(
                connect_timeout, "finding the results", _assign_all(consumer, topic, from_beginning)
            )
        else:
            consumer.subscribe([topic], listener=_OnRebalance(collector))
        last_commit = loop.time()
        silence, read = Silence(_TURN_S), 0
        while True:
            silence.listen(loop.time())  # what our reader did with a result is no time without results
            try:
                found = await poll(consumer, timeout_ms=_POLL_MS)
            except (KafkaError, OSError) as error:
                raise connection.failed(error, "reading the results") from error
            read += len(found)
            quiet = silence.look(read or None, loop.time())
            for record in found:
                result = _result(collector, record)
                if result is not None:
                    yield result
                collector.taken(record.partition, record.offset)
            if group is not None and loop.time() - last_commit >= _COMMIT_EVERY_S:
                await _commit(consumer, topic, collector)
                last_commit = loop.time()
            if idle is not None and quiet >= idle:
                return
    finally:
        if group is not None:
            await _commit(consumer, topic, collector)
        await close(consumer)


def _result(collector: ResultCollector, record: Polled) -> JobResult | None:
    """The result that a record completes. One that cannot be read is an error of its own, and reading goes on."""
    if isinstance(record, UnreadableRecord):
        return _unreadable(record, record.reason)
    try:
        reply = read_checked(record.value, value_of(record.headers, names.CONTENT_TYPE))
        return collector.add(record.partition, record.offset, reply, len(record.value or b""))
    except BadReply as bad:
        return _unreadable(record, str(bad))


def _unreadable(record: Polled, why: str) -> JobResult:
    first = record.first_offset if isinstance(record, UnreadableRecord) else record.offset
    where = f"offset {record.offset}" if first == record.offset else f"offsets {first} to {record.offset}"
    detail = f"{why} at {record.topic}-{record.partition}, {where}"
    return JobResult(id=None, embeddings=None, error=UnreadableReply(detail=detail))


async def _assign_all(consumer: AIOKafkaConsumer, topic: str, from_beginning: bool) -> None:
    first = TopicPartition(topic, 0)
    consumer.assign([first])
    await consumer.position(first)  # makes the client ask for the topic's metadata
    everything = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or {0})]
    consumer.assign(everything)
    if from_beginning:
        await consumer.seek_to_beginning(*everything)
    else:
        await consumer.seek_to_end(*everything)
    for tp in everything:
        await consumer.position(tp)


async def _commit(consumer: AIOKafkaConsumer, topic: str, collector: ResultCollector) -> None:
    """Commit, or not: what is not committed is read again, and at-least-once is the promise."""
    held = {tp.partition for tp in consumer.assignment()}
    offsets = {TopicPartition(topic, n): at for n, at in collector.committable().items() if n in held}
    if offsets:
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await consumer.commit(offsets)
        except (KafkaError, OSError, TimeoutError):
            return
