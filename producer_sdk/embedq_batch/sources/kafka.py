"""Kafka topics of documents, or of jobs, from a time or from offsets on to where they end when the pass begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import pyarrow as pa

from embedq_batch.content.columns import Columns
from embedq_batch.content.documents import Document, DocumentReader, document_of
from embedq_batch.content.inference import LOOKED_AT, inferred
from embedq_batch.content.jobs import documents_of
from embedq_batch.content.rows import RowBatch
from embedq_batch.errors import BadSource
from embedq_batch.sources.source import Since
from embedq_sdk.errors import KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import KafkaConnection, require_topics
from embedq_sdk.transport.kafka import close as closed
from embedq_shared.kafka import KafkaError, Polled, TopicPartition, poll, position
from embedq_shared.topics import Topics

_T = TypeVar("_T")
_CONNECT_S: Final = 10.0
_POLL_MS: Final = 500


class KafkaSource:
    """The documents of topics, read from their records by `documents`. Of two with one id the later one counts, and a tombstone
    deletes.

    Its client runs in an event loop of its own: a source is read in a thread, batch by batch.
    """

    latest_wins = True
    ids = str

    def __init__(
        self,
        topics: Sequence[str],
        columns: Columns,
        servers: str | Sequence[str],
        security: Mapping[str, Any],
        *,
        since: Since | None = None,
        documents: Callable[[Polled], list[Document]] | None = None,
    ) -> None:
        self._topics = list(topics)
        self._documents_of = documents or (lambda record: [document_of(record, columns.id)])
        self._columns = columns
        self._connection = KafkaConnection.of(
            list(servers) if not isinstance(servers, str) else servers, security
        )
        self.since = since
        self._kept: pa.Schema | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        return ", ".join(f"kafka:{topic}" for topic in self._topics)

    @property
    def kept(self) -> pa.Schema | None:
        return self._kept

    def open(self) -> None:
        self._loop = asyncio.new_event_loop()
        if not self._columns.keep:
            self._run(self._checked())
            return
        records: list[dict[str, Any]] = []
        for some in self._documents():
            records += [each.record for each in some if isinstance(each.record, dict)]
            if len(records) >= LOOKED_AT:
                break
        self._kept = inferred(records[:LOOKED_AT], self._columns.keep, self.name)

    def count(self) -> int | None:
        return None

    def batches(self) -> Iterator[RowBatch]:
        reader = DocumentReader(self._columns, self._kept)
        for some in self._documents():
            yield reader.batch(some)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _documents(self) -> Iterator[list[Document]]:
        reading = self._read()
        try:
            while (some := self._run(anext(reading, None))) is not None:
                yield some
        finally:
            self._run(reading.aclose())

    def _run(self, work: Coroutine[Any, Any, _T] | Any) -> Any:
        if self._loop is None:
            raise RuntimeError("a topic is read before it is opened. This is a bug.")
        try:
            return self._loop.run_until_complete(work)
        except (KafkaUnavailable, TopicMissing) as error:
            raise BadSource(source=self.name, reason=str(error)) from None

    async def _checked(self) -> None:
        async with self._connection.client(self._connection.consumer, _CONNECT_S) as consumer:
            await require_topics(self._connection, consumer, self._topics, _CONNECT_S)

    def _topics_among(self, there: Collection[str]) -> Sequence[str]:
        """What is read of the topics that are there; `self._topics` are."""
        return self._topics

    async def _read(self) -> AsyncGenerator[list[Document], None]:
        consumer = await self._connection.connect(
            lambda: self._connection.consumer(isolation_level="read_committed"), _CONNECT_S
        )
        try:
            there = await require_topics(self._connection, consumer, self._topics, _CONNECT_S)
            assigned = self._assigned(consumer, self._topics_among(there))
            ends = await self._connection.call(_CONNECT_S, "finding the documents", assigned)
            while ends:
                try:
                    found = await poll(consumer, timeout_ms=_POLL_MS)
                except (KafkaError, OSError) as error:
                    raise self._connection.failed(error, "reading the documents") from error
                some = [
                    document
                    for each in found
                    if each.offset < ends.get(TopicPartition(each.topic, each.partition), 0)
                    for document in self._documents_of(each)
                ]
                if some:
                    yield some
                for partition, end in list(ends.items()):
                    at = await position(consumer, partition)
                    if at is not None and at >= end:
                        del ends[partition]
        finally:
            await closed(consumer)

    async def _assigned(self, consumer: Any, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """Begin where it is asked for; where each partition ends that has something."""
        firsts = [TopicPartition(topic, 0) for topic in topics]
        consumer.assign(firsts)
        for first in firsts:
            await consumer.position(first)  # makes the client ask for the topic's metadata
        everything = [
            TopicPartition(topic, n)
            for topic in topics
            for n in sorted(consumer.partitions_for_topic(topic) or {0})
        ]
        consumer.assign(everything)
        starts: dict[Any, int] = await consumer.beginning_offsets(everything)
        ends: dict[Any, int] = await consumer.end_offsets(everything)
        if isinstance(self.since, int):
            found = await consumer.offsets_for_times(dict.fromkeys(everything, self.since))
            starts = {tp: ends[tp] if found.get(tp) is None else found[tp].offset for tp in everything}
        elif self.since is not None:
            at = offsets_from(
                self.since,
                {tp.partition: starts[tp] for tp in everything},
                {tp.partition: ends[tp] for tp in everything},
                self.name,
            )
            starts = {tp: at[tp.partition] for tp in everything}
        for tp in everything:
            consumer.seek(tp, starts[tp])
        return {tp: ends[tp] for tp in everything if starts[tp] < ends[tp]}


class JobsSource(KafkaSource):
    """The jobs that were submitted, of all pools: to which one a job went was its alias's affair, and may have changed since.

    It is called by the default pool's lanes: a pool that is new, or goes, makes it no other source.
    """

    def __init__(
        self,
        topics: Topics,
        columns: Columns,
        servers: str | Sequence[str],
        security: Mapping[str, Any],
        *,
        since: Since | None = None,
    ) -> None:
        super().__init__(topics.lanes, columns, servers, security, since=since, documents=documents_of)
        self._service = topics

    def _topics_among(self, there: Collection[str]) -> Sequence[str]:
        pools = [None, *self._service.pools_among(there)]
        return [lane for pool in pools for lane in self._service.of(pool).lanes]


def offsets_from(
    wanted: Mapping[int, int], starts: Mapping[int, int], ends: Mapping[int, int], source: str
) -> dict[int, int]:
    """Where each partition of a topic is begun; one that is not named, at its start.

    Raises:
        BadSource: there is no such partition, or its log has no such offset: what was there is deleted, or not yet written.
    """
    for partition, offset in wanted.items():
        if partition not in starts:
            last = max(starts, default=0)
            raise BadSource(source=source, reason=f"partition {partition}: expected 0 to {last}")
        if not starts[partition] <= offset <= ends[partition]:
            has = f"{starts[partition]} to {ends[partition]}"
            raise BadSource(
                source=source, reason=f"partition {partition}: offset {offset}: its log has {has}"
            )
    return {**starts, **wanted}
