"""What tests of delivery count: jobs that went in, results that came out, and where the group stands."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Reader, Replica, partitions_of, producer
from tests.helpers.support import patience, patient, wait_until

MakeJob = Callable[[int], dict[str, Any]]


def short_job(number: int) -> dict[str, Any]:
    """A text that no other job has, so that the cache answers none but repeats."""
    return {"id": f"job-{number}", "input": f"text number {number}", "dimensions": 32}


def long_job(number: int) -> dict[str, Any]:
    """A few hundred tokens, so that the model is what takes time."""
    return short_job(number) | {"input": f"text number {number}" + " and then some more of the same" * 8}


async def preload(stack: DevStack, topic: str, count: int, make: MakeJob = short_job) -> list[str]:
    """Put jobs into a topic, spread over its partitions; their ids."""
    async with producer(stack, enable_idempotence=True) as client:
        partitions = sorted(await client.partitions_for(topic))
        jobs = [make(number) for number in range(count)]
        sent = [
            await client.send(topic, json.dumps(job).encode(), partition=partitions[index % len(partitions)])
            for index, job in enumerate(jobs)
        ]
        await asyncio.gather(*sent)
    return [job["id"] for job in jobs]


class _NotUtf8(str):
    """A header name whose bytes on the wire are no text."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        return b"\xff\xfe"


async def send_unreadable(client: AIOKafkaProducer, topic: str, partition: int, key: bytes) -> None:
    """A record that aiokafka's consumer raises for at each poll: the name of its header is not UTF-8."""
    batch = client.create_batch()
    # The compiled builder takes nothing but text; the one in Python asks the name for its bytes.
    batch._builder = _DefaultRecordBatchBuilderPy(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=10_000,
    )
    batch.append(key=key, value=b"{}", timestamp=None, headers=[(_NotUtf8("name"), b"")])
    await (await client.send_batch(batch, topic, partition=partition))


class Answered:
    """The results on a reader, by job id. Nothing else may use that reader."""

    def __init__(self, results: Reader) -> None:
        self._results = results
        self._decoded: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()

    async def until(self, ids: Iterable[str], *, within: float = 120.0) -> None:
        """Wait until each of these jobs has a result."""
        waiting, started = set(ids), time.monotonic()
        while missing := waiting - self._counts.keys():
            # Asked again each time: the load may have come after the beginning.
            left = within - (time.monotonic() - started) / patience()
            try:
                await self.more(within=min(60.0, max(0.0, left)))
            except AssertionError as error:
                raise AssertionError(f"{len(missing)} of {len(waiting)} jobs have no result") from error

    async def some(self, count: int, *, within: float = 60.0) -> None:
        """Wait until there are `count` results."""
        await self._results.until(count, within=within)
        self._decode()

    async def more(self, *, within: float = 60.0) -> None:
        """Wait for at least one more result."""
        await self._results.until(len(self._decoded) + 1, within=within)
        self._decode()

    async def all(self) -> list[dict[str, Any]]:
        """Every result up to the topic's end as it is now."""
        await self._results.all()
        self._decode()
        return self._decoded

    def counts(self) -> Counter[str]:
        """How many results each job has."""
        return self._counts.copy()

    def duplicates(self) -> int:
        """Results beyond the first of each job."""
        return self._counts.total() - len(self._counts)

    def __contains__(self, id: object) -> bool:
        """Whether this job has a result."""
        return id in self._counts

    @property
    def jobs(self) -> int:
        """How many jobs have a result."""
        return len(self._counts)

    @property
    def results(self) -> list[dict[str, Any]]:
        """What has been read so far."""
        return self._decoded

    def _decode(self) -> None:
        new = [msgspec.json.decode(each.value) for each in self._results.records[len(self._decoded) :]]
        self._decoded += new
        self._counts.update(result["id"] for result in new)


class Load:
    """Jobs that keep coming: never more than `window` without an answer, until `finish`."""

    def __init__(
        self, client: AIOKafkaProducer, topic: str, answered: Answered, window: int, make: MakeJob
    ) -> None:
        self._client = client
        self._topic = topic
        self._window = window
        self._make = make
        self._ending = False
        self.answered = answered
        self.ids: list[str] = []

    async def run(self) -> None:
        """Send and read until `finish`, and on until every job has its answer."""
        open_: set[str] = set()
        while True:
            open_ = {id for id in open_ if id not in self.answered}
            if self._ending and not open_:
                return
            while not self._ending and len(open_) < self._window:
                job = self._make(len(self.ids))
                await self._client.send(self._topic, json.dumps(job).encode(), key=job["id"].encode())
                self.ids.append(job["id"])
                open_.add(job["id"])
            await self.answered.more()

    async def progress(self, count: int, *, within: float = 90.0) -> None:
        """Wait until `count` more jobs have their answer."""
        target = self.answered.jobs + count
        await wait_until(lambda: self.answered.jobs >= target, within=within, what=f"{count} more answers")

    def finish(self) -> None:
        """Send no more."""
        self._ending = True


@asynccontextmanager
async def load(
    stack: DevStack, topic: str, results: Reader, *, window: int = 64, make: MakeJob = short_job
) -> AsyncIterator[Load]:
    """Run a load alongside the block, and wait for its last answers at the end."""
    async with producer(stack, enable_idempotence=True) as client:
        running = Load(client, topic, Answered(results), window, make)
        task = asyncio.create_task(running.run())
        try:
            yield running
            running.finish()
            async with asyncio.timeout(patient(120)):
                await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    await running.answered.all()


@asynccontextmanager
async def administering(stack: DevStack) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client for topics, offsets and their like."""
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


class _Lanes(NamedTuple):
    """What to ask again and again of both lanes' partitions."""

    ends: Callable[[], Awaitable[dict[TopicPartition, int]]]
    committed: Callable[[], Awaitable[dict[TopicPartition, int]]]
    """By the service's group; 0 where it has committed nothing."""


@asynccontextmanager
async def _lanes(stack: DevStack, topics: Topics) -> AsyncIterator[_Lanes]:
    group = topics.group(f"{topics.prefix}.embedq")
    reader = AIOKafkaConsumer(bootstrap_servers=stack.kafka_servers)
    async with administering(stack) as admin:
        await reader.start()
        try:
            partitions = await partitions_of(admin, topics.lanes)

            async def committed() -> dict[TopicPartition, int]:
                found = await admin.list_consumer_group_offsets(group)
                return {tp: max(0, found[tp].offset) if tp in found else 0 for tp in partitions}

            yield _Lanes(lambda: reader.end_offsets(partitions), committed)
        finally:
            await reader.stop()


async def uncommitted(stack: DevStack, topics: Topics) -> int:
    """Records of both lanes that the group has not committed."""
    async with _lanes(stack, topics) as lanes:
        ends, committed = await lanes.ends(), await lanes.committed()
        return sum(end - committed[tp] for tp, end in ends.items())


async def until_committed(stack: DevStack, topics: Topics, *, within: float = 30.0) -> None:
    """Wait until the group has committed all that both lanes hold now."""
    async with _lanes(stack, topics) as lanes:
        ends = await lanes.ends()

        async def nothing_left() -> bool:
            committed = await lanes.committed()
            return all(committed[tp] >= end for tp, end in ends.items())

        await wait_until(nothing_left, within=within, what="a commit of everything")


async def until_it_logged(replica: Replica, event: str, *, times: int = 1, within: float = 60.0) -> None:
    """Wait for an event in a replica's log."""
    await wait_until(
        lambda: sum(found["event"] == event for found in replica.events()) >= times,
        within=within,
        what=f"`{event}` in the log of a replica",
    )


async def statuses(results: Reader) -> list[dict[str, Any]]:
    """Every status so far, oldest first."""
    return [json.loads(record.value) for record in await results.all()]
