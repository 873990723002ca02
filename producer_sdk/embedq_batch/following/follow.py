"""Follow a topic into a store, as a member of a group: read, embed, write, commit; then the next ones.

An offset is committed after the store has acknowledged everything before it, so a kill repeats what was in hand, and an upsert by id
makes nothing of that. With late chunks a document's new vectors are written first, then those of the old one that it has no more are deleted. Of a document that is changed while its partition moves to another member, the slower member may write last;
the next change, or a run over the topic, mends that.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from embedq_batch.content.rows import Problem, RowId, Shape, VectorBatch, joined
from embedq_batch.errors import DocumentRefused, RowsRefused
from embedq_batch.following.feeds import Feed, Taken
from embedq_batch.running.embedding import Embedder
from embedq_batch.running.progress import Progress
from embedq_batch.running.reading import job_rows
from embedq_batch.running.threads import Thread, patiently
from embedq_batch.sinks.sink import Followed
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics
from embedq_shared.kafka import (
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    KafkaError,
    Polled,
    TopicPartition,
    UnreadableRecord,
    poll,
)

_T = TypeVar("_T")
_POLL_MS: Final = 500
_CONNECT_S: Final = 10.0
_SESSION_MS: Final = 30_000
_LONGEST_PAUSE_MS: Final = 3_600_000
"""Between two polls: a store may be away for as long without losing us our partitions."""
_COMMIT_S: Final = 10.0
ERROR_CODE: Final = "embedq-error-code"
ERROR_MESSAGE: Final = "embedq-error-message"
_OTHER_KIND: Final = Problem(
    "other_vectors",
    "expected what the store is for, rows with one vector each or rows with a vector for each span, got the other",
)
ORIGIN: Final = "embedq-origin"
"""Headers of a dead letter: why, and the topic, partition and offset of the record that it is a copy of."""


class FollowOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is followed, and how."""

    topic: str
    group: str
    dead_letters: str | None = None
    """The topic for what cannot be embedded or stored; None: the first such record ends the command."""
    job_texts: int = 64
    in_flight: int = 64
    """Jobs at once."""


class NoParts:
    """A store that is followed into has no manifest."""

    def parts(self) -> dict[int, int]:
        return {}

    def in_part(self, part: int) -> list[tuple[int, int]]:
        return []


class Following:
    """One member of the group.

    Invariants:
        - An offset is committed only when the store has everything before it, or a dead letter says why not.
        - At most one poll's records are in hand.
    """

    # More than six parameters: the parts of a standing sink, each with another owner.
    def __init__(
        self,
        connection: KafkaConnection,
        feed: Feed,
        embedder: Embedder | None,
        sink: Followed,
        options: FollowOptions,
        progress: Progress,
    ) -> None:
        self._connection = connection
        self._feed = feed
        self._embedder = embedder
        self._sink = sink
        self._options = options
        self._progress = progress
        self._thread = Thread("embedq-sink")
        self._shape_there: Shape | None = None
        """What the store was opened for."""
        self._letters: AIOKafkaProducer | None = None

    async def run(self) -> None:
        """Follow until cancelled.

        Raises:
            DocumentRefused, BadTarget, InvalidArgument, KafkaUnavailable, TopicMissing, EmbedError.
        """
        options, connection = self._options, self._connection
        # With its first list pyarrow imports pandas where that is installed: a second, in which the loop would send no heartbeat.
        await asyncio.to_thread(pa.array, [0])
        consumer = await connection.connect(
            lambda: connection.consumer(
                group_id=options.group,
                session_timeout_ms=_SESSION_MS,
                max_poll_interval_ms=_LONGEST_PAUSE_MS,
                isolation_level="read_committed",
            ),
            _CONNECT_S,
        )
        try:
            wanted = [options.topic, *([options.dead_letters] if options.dead_letters else [])]
            await require_topics(connection, consumer, wanted, _CONNECT_S)
            if options.dead_letters:
                self._letters = await connection.connect(connection.producer, _CONNECT_S)
            consumer.subscribe([options.topic], listener=_OnRebalance(self._feed))
            while True:
                try:
                    records = await poll(consumer, timeout_ms=_POLL_MS)
                except (KafkaError, OSError) as error:
                    raise connection.failed(error, "reading the topic") from error
                if records:
                    await self.take(records)
                    await self._commit(consumer)
        finally:
            await close(consumer)
            if self._letters is not None:
                await close(self._letters)
            await self._thread(self._sink.close)
            await self._thread.close()

    async def take(self, records: Sequence[Polled]) -> None:
        """Take some records: then the store has what they hold, or a dead letter says why not.

        Raises:
            DocumentRefused, BadTarget, InvalidArgument, KafkaUnavailable, EmbedError.
        """
        if self._feed.keep and self._feed.there is None:
            self._feed.there = await self._store(self._sink.kept_types, self._feed.keep)
        taken = self._feed.take(records)
        for record, problem in taken.problems:
            await self._refused(record, problem)
        vectors = list(taken.vectors)
        if taken.rows is not None:
            vectors += await self._embedded(taken)
        for some in _alike(vectors):
            await self._write(joined(some), taken)
        if taken.rows is not None and taken.rows.deleted:
            await self._delete(taken.rows.deleted)
        if self._shape_there is not None:
            await self._store(self._sink.flush)
        self._progress.read += len(records)

    async def _embedded(self, taken: Taken) -> list[VectorBatch]:
        """The vectors of rows, several jobs at once."""
        rows, embedder = taken.rows, self._embedder
        if rows is None or embedder is None:
            raise RuntimeError("rows came from a topic of results. This is a bug.")
        room = asyncio.Semaphore(self._options.in_flight)
        found: list[VectorBatch] = []

        async def one(chosen: Sequence[int]) -> None:
            batch = rows.only(chosen)
            async with room:
                answered = await embedder.embed(batch)
            self._progress.tokens += answered.tokens
            self._progress.cached += answered.cached
            self._progress.device_s += answered.device_s
            found.extend(group.vectors for group in answered.groups)
            for n, problem in answered.problems.items():
                await self._refused(taken.origins[batch.ids[n]], problem)

        try:
            async with asyncio.TaskGroup() as jobs:
                for chosen in job_rows(rows, range(len(rows)), self._options.job_texts):
                    jobs.create_task(one(chosen))
        except ExceptionGroup as several:  # the first one ends the command, and is what is said
            raise several.exceptions[0] from None
        return found

    async def _opened(self, like: VectorBatch) -> Shape:
        """What the store is open for: for vectors like these, if it was not yet."""
        if self._shape_there is None:
            shape = _shape(like, self._feed.kept)
            if shape.dtype not in self._sink.dtypes:
                raise InvalidArgument(
                    argument="dtype",
                    expected=f"{' or '.join(sorted(self._sink.dtypes))} for {self._sink.name}",
                    got=shape.dtype,
                )
            await self._store(lambda: self._sink.open(shape, NoParts(), force=False))
            self._shape_there = shape
        return self._shape_there

    async def _write(self, batch: VectorBatch, taken: Taken) -> None:
        """Write rows; where the store refuses them, halves, until those that it refuses are alone."""
        rows = _rows_of(batch)
        if (await self._opened(batch)).spans != (batch.rows is not None):
            await self._refuse(rows, _OTHER_KIND, taken)
            return
        try:
            await self._store(self._sink.write, batch)
        except RowsRefused as refused:
            half = _half(batch)
            if half is None:
                await self._refuse(rows, Problem("refused", refused.reason), taken)
                return
            await self._write(batch.part(0, half), taken)
            await self._write(batch.part(half, len(batch)), taken)
            return
        if batch.rows is not None:
            await self._store(self._sink.delete_spans, rows, batch.ids)
        self._progress.embedded += len(rows)

    async def _delete(self, rows: Sequence[RowId]) -> None:
        """Delete rows, also before anything was written."""
        shape = self._shape_there
        if shape is None and self._embedder is not None:
            shape = await self._opened(await self._embedder.probe())
        if shape is not None and shape.spans:
            await self._store(self._sink.delete_spans, rows, [])
        else:
            await self._store(self._sink.delete, rows)
        self._progress.deleted += len(rows)

    async def _store(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await patiently(self._thread, self._progress, function, *arguments)

    async def _refuse(self, rows: Sequence[RowId], problem: Problem, taken: Taken) -> None:
        """Records of which the store gets nothing, each once."""
        records = {(record.partition, record.offset): record for record in (taken.origins[id] for id in rows)}
        for record in records.values():
            await self._refused(record, problem)

    async def _refused(self, record: Polled, problem: Problem) -> None:
        """A record of which the store gets nothing: a dead letter, or the end."""
        where = f"{record.topic}-{record.partition}-{record.offset}"
        if self._letters is None:
            raise DocumentRefused(where=where, code=problem.code, reason=problem.message)
        key, value, headers = None, b"", []
        if not isinstance(record, UnreadableRecord):
            key, value, headers = record.key, record.value, list(record.headers)
        headers += [
            (ERROR_CODE, problem.code.encode()),
            (ERROR_MESSAGE, problem.message.encode()),
            (ORIGIN, where.encode()),
        ]
        await self._connection.call(
            _COMMIT_S,
            "writing a dead letter",
            self._letters.send_and_wait(self._options.dead_letters, key=key, value=value, headers=headers),
        )
        self._progress.failed += 1

    async def _commit(self, consumer: Any) -> None:
        """Commit, or not: what is not committed is read again, and written again, which changes nothing."""
        held = {tp.partition for tp in consumer.assignment()}
        offsets = {
            TopicPartition(self._options.topic, n): at
            for n, at in self._feed.committable().items()
            if n in held
        }
        if not offsets:
            return
        try:
            async with asyncio.timeout(_COMMIT_S):
                await consumer.commit(offsets)
        except (KafkaError, OSError, TimeoutError) as error:
            self._progress.waiting = f"offsets are not committed: {error}"
        else:
            self._progress.waiting = None


class _OnRebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self._feed.forget([tp.partition for tp in revoked])

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        pass


def _shape(batch: VectorBatch, kept: pa.Schema | None) -> Shape:
    """What the store is opened for."""
    packed, halves = batch.vectors.dtype == np.uint8, batch.vectors.dtype == np.float16
    return Shape(
        width=batch.vectors.shape[1],
        dtype="binary" if packed else "float16" if halves else "float32",
        spans=batch.rows is not None,
        ids="string",
        kept=kept,
        model_version=batch.model_version,
    )


def _alike(batches: list[VectorBatch]) -> list[list[VectorBatch]]:
    """Batches that can be written at once, one after the other."""
    return [list(some) for _, some in itertools.groupby(batches, _kind)]


def _kind(batch: VectorBatch) -> tuple[str, int, bool]:
    return batch.model_version, batch.vectors.shape[1], batch.rows is None


def _rows_of(batch: VectorBatch) -> Sequence[RowId]:
    """The rows that a batch has vectors of."""
    return batch.ids if batch.rows is None else list(dict.fromkeys(batch.rows))


def _half(batch: VectorBatch) -> int | None:
    """Where a batch is cut in two, all vectors of a row on one side; None where it is one row."""
    rows = batch.ids if batch.rows is None else batch.rows
    cuts = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1]]
    return cuts[len(cuts) // 2] if cuts else None
