"""What an onlooker sees of a run, past the proxies: job records, results, dead letters and commits, in the brokers' logs.

An onlooker's own trouble with a broker that is being killed is no finding: it connects again and reads on where it was.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from embedq_shared.headers import value_of
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    ConsumerRecord,
    KafkaError,
    TopicPartition,
    stop_client,
)
from embedq_shared.topics import Topics
from tests.faults import group_log, leaders
from tests.faults.history import Accepted, Committed, DeadLetter, Ends, HistoryWriter, Mode, Result, place
from tests.faults.load import JobMaker, Judge

log = structlog.get_logger()

_TROUBLE: Final = (KafkaError, OSError, TimeoutError, AssertionError, KeyError, ValueError)
"""What aiokafka raises while brokers come and go; some of it by accident."""
_STEP_S: Final = 10.0
_PAUSE_S: Final = 0.5
_LOOK_EVERY_S: Final = 0.25
_FETCH_BYTES: Final = 4 * 1024 * 1024


class Progress:
    """How far the run is, as the onlooker sees it."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        """Jobs in the log without a result so far."""
        self.accepted: set[str] = set()
        self.answered: set[str] = set()
        self.results = 0
        self.repeats = 0
        self.committed: dict[str, int | None] = {}
        """By `topic/partition`; noted once it is in the history."""

    def job(self, id: str) -> None:
        self.accepted.add(id)
        if id not in self.answered:
            self.open.add(id)

    def result(self, id: str, part: int) -> None:
        self.results += 1
        if part == 0:
            self.repeats += id in self.answered
            self.answered.add(id)
            self.open.discard(id)


class LogReader:
    """Reads whole topics from their beginning, each record once, whatever happens to the brokers."""

    def __init__(
        self, servers: str, topics: Sequence[str], mode: Mode, see: Callable[[ConsumerRecord], None]
    ) -> None:
        self._servers = servers
        self._topics = topics
        self._isolation = "read_committed" if mode == "exactly-once" else "read_uncommitted"
        self._see = see
        self.positions: dict[TopicPartition, int] = {}

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._servers,
                auto_offset_reset="earliest",
                isolation_level=self._isolation,
                fetch_max_wait_ms=100,
                max_partition_fetch_bytes=_FETCH_BYTES,
                request_timeout_ms=15_000,
            )
            try:
                async with asyncio.timeout(2 * _STEP_S):
                    await consumer.start()
                    partitions = await self._partitions(consumer)
                    consumer.assign(partitions)
                for partition in partitions:
                    consumer.seek(partition, self.positions.setdefault(partition, 0))
                await self._read(consumer)
            except _TROUBLE as error:
                log.info("reader_connects_again", reason=repr(error))
                await asyncio.sleep(_PAUSE_S)
            finally:
                await stop_client(consumer, _STEP_S)

    async def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        await consumer._client.set_topics(self._topics)
        found = [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in sorted(consumer._client.cluster.partitions_for_topic(topic) or ())
        ]
        if {partition.topic for partition in found} != set(self._topics):
            raise ValueError("not every topic is known yet")
        return found

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            for partition, records in (await consumer.getmany(timeout_ms=200)).items():
                for record in records:
                    # A reader that was set back, by a reset that the client makes by itself, sees nothing twice.
                    if record.offset >= self.positions[partition]:
                        self.positions[partition] = record.offset + 1
                        self._see(record)


class Observer:
    """Notes everything in the history."""

    # More than six parameters: what a run consists of, in one place.
    def __init__(
        self,
        servers: str,
        topics: Topics,
        others: Sequence[str],
        *,
        history: HistoryWriter,
        maker: JobMaker,
        judge: Judge,
        mode: Mode,
        group: str,
        clock: Callable[[], float],
    ) -> None:
        """`others`: topics with results beside embedq's own."""
        self._servers = servers
        self._topics = topics
        self._results = (topics.results, topics.replies, *others)
        self._history = history
        self._maker = maker
        self._judge = judge
        self._mode = mode
        self._group = group
        self._clock = clock
        self._commits: list[Committed] = []
        """Read, and not in the history so far: the ends of the results are not known yet."""
        self.progress = Progress()
        read = (*topics.lanes, topics.results, topics.replies, topics.dead_letters)
        # A topic that is deleted must not trouble the reader of all others.
        self._readers = [
            LogReader(servers, names, mode, self._see) for names in (read, *((o,) for o in others))
        ]
        # Offsets of a transaction count once it is committed.
        self._readers.append(LogReader(servers, (group_log.TOPIC,), "exactly-once", self._see_commit))

    async def run(self) -> None:
        """Look on until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for reader in self._readers:
                tasks.create_task(reader.run())
            tasks.create_task(self._note_commits())

    def forget(self, topic: str) -> None:
        """This topic was deleted: offsets begin anew."""
        for reader in self._readers:
            for partition in [found for found in reader.positions if found.topic == topic]:
                reader.positions[partition] = 0

    async def ends(self, topics: Sequence[str]) -> dict[str, int]:
        """The ends of these topics' partitions, by `topic/partition`.

        Raises:
            KafkaError, OSError, TimeoutError: a broker does not answer.
        """
        consumer = AIOKafkaConsumer(bootstrap_servers=self._servers, request_timeout_ms=5000)
        try:
            await consumer.start()
            return await self._ends(consumer, topics)
        finally:
            await stop_client(consumer, _STEP_S)

    def has_read(self, ends: dict[str, int]) -> bool:
        """Whether the readers are past these ends. Markers of transactions at an end are never read: do not ask then."""
        positions = {
            place(partition.topic, partition.partition): position
            for reader in self._readers
            for partition, position in reader.positions.items()
        }
        return all(positions.get(name, 0) >= end for name, end in ends.items())

    @property
    def has_noted_commits(self) -> bool:
        """Whether all commits that were read are in the history."""
        return not self._commits

    # -- records ------------------------------------------------------------------------------------------------------

    def _see(self, record: ConsumerRecord) -> None:
        if record.topic in self._topics.lanes:
            self._see_job(record)
        elif record.topic == self._topics.dead_letters:
            self._see_letter(record)
        else:
            self._see_result(record)

    def _see_job(self, record: ConsumerRecord) -> None:
        job = self._maker.job(record.key.decode())
        self.progress.job(job.id)
        self._history.add(
            Accepted(
                at=self._clock(),
                id=job.id,
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                expects=job.expects,
                buried=job.buried,
                reply_topic=job.reply[0],
                reply_partition=job.reply[1],
                fragile=job.fragile,
            )
        )

    def _see_result(self, record: ConsumerRecord) -> None:
        id = (record.key or b"").decode(errors="replace")
        answer = self._judge.answer(self._maker.job(id), record.value, record.headers)
        self.progress.result(id, answer.part)
        self._history.add(
            Result(
                at=self._clock(),
                id=id,
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                status=(value_of(record.headers, "embedq-status") or b"").decode(),
                code=answer.code,
                part=answer.part,
                parts=answer.parts,
                model_version=answer.model_version,
                cosine=answer.cosine,
                digest=answer.digest,
            )
        )

    def _see_letter(self, record: ConsumerRecord) -> None:
        origin = [value_of(record.headers, f"kafka_dlt-original-{name}") or b"" for name in _ORIGIN]
        self._history.add(
            DeadLetter(
                at=self._clock(),
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                origin_topic=origin[0].decode(),
                origin_partition=struct.unpack(">i", origin[1])[0],
                origin_offset=struct.unpack(">q", origin[2])[0],
                code=(value_of(record.headers, "embedq-error-code") or b"").decode(),
            )
        )

    # -- the group ----------------------------------------------------------------------------------------------------

    def _see_commit(self, record: ConsumerRecord) -> None:
        stored = group_log.stored_by(record.key, record.value)
        if stored is not None and stored.group == self._group:
            self._commits.append(
                Committed(
                    at=self._clock(), record=record.offset, partition=stored.partition, offset=stored.offset
                )
            )

    async def _note_commits(self) -> None:
        """First commits, then the ends: what was published before a commit lies below the ends then."""
        while True:
            consumer = AIOKafkaConsumer(bootstrap_servers=self._servers, request_timeout_ms=5000)
            try:
                async with asyncio.timeout(2 * _STEP_S):
                    await consumer.start()
                while True:
                    started = time.monotonic()
                    if self._commits:
                        async with asyncio.timeout(_STEP_S):
                            await self._look(consumer)
                    await asyncio.sleep(max(0.0, _LOOK_EVERY_S - (time.monotonic() - started)))
            except _TROUBLE as error:
                log.info("onlooker_connects_again", reason=repr(error))
                await asyncio.sleep(_PAUSE_S)
            finally:
                await stop_client(consumer, _STEP_S)

    async def _look(self, consumer: AIOKafkaConsumer) -> None:
        count = len(self._commits)
        ends = await self._ends(consumer, (*self._results, self._topics.dead_letters))
        commits, self._commits = self._commits[:count], self._commits[count:]
        for commit in commits:
            self._history.add(commit)
            self.progress.committed[commit.partition] = commit.offset
        self._history.add(Ends(at=self._clock(), ends=ends))

    async def _ends(self, consumer: AIOKafkaConsumer, topics: Sequence[str]) -> dict[str, int]:
        ends = await leaders.ends_of(consumer, topics)
        return {place(partition.topic, partition.partition): end for partition, end in ends.items()}


_ORIGIN: Final = ("topic", "partition", "offset")
