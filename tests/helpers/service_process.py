"""The real service as processes, for tests that prove promises: started, watched, killed, restarted."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code
from prometheus_client.parser import text_string_to_metric_families

from embedq_sdk.admin.topics import wanted_topics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import DEFAULT_POOL, Topics
from tests.helpers import warm_start
from tests.helpers.support import patient, wait_until
from tests.helpers.warm_start import WarmProcess

_MEASURED: Final = "COVERAGE_PROCESS_CONFIG" in os.environ
"""Whether coverage is measured: it costs the half second that an orderly end takes."""

_LEAVE_S: Final = 5.0


def fresh_prefix() -> str:
    """A topic prefix that no other test has."""
    return f"t{uuid.uuid4().hex[:10]}"


async def make_topics(
    stack: DevStack,
    prefix: str,
    *,
    partitions: int = 4,
    copies: int = 1,
    names: Iterable[str] = (),
    only: Collection[str] = (),
    pool: str | None = None,
) -> Topics:
    """embedq's topics below this prefix, and other ones by name, with this many copies of each partition. `only`: these of ours.
    `pool`: those of another pool, beside the default one's."""
    wanted = wanted_topics(
        prefix, partitions=partitions, reply_partitions=partitions, retry_tiers=0, pool=pool
    )
    new = [
        NewTopic(topic.name, topic.partitions, copies, topic_configs=dict(topic.config))
        for topic in wanted
        if not only or topic.name in only
    ]
    new += [NewTopic(name, partitions, copies) for name in names]
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        response = await admin.create_topics(new)
        for topic, code, *_ in response.topic_errors:
            if code:
                raise for_code(code)(topic)
    finally:
        await admin.close()
    return Topics(prefix, pool)


class Replica:
    """One service process. Its group and topics follow from the prefix, so replicas of one prefix share the work."""

    def __init__(
        self,
        stack: DevStack,
        topics: Topics,
        model: Path,
        log: Path,
        *,
        redis: bool = True,
        python: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.log = log
        self._read = 0
        self._events: list[dict[str, Any]] = []
        self._python = list(python) or ["-m", "embedq_consumer"]
        self._environ = {
            name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")
        } | {
            "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
            "EMBEDQ_REDIS_URL": stack.redis_url if redis else "",
            "EMBEDQ_TOPIC_PREFIX": topics.prefix,
            "EMBEDQ_GROUP": f"{topics.prefix}.embedq",
            "EMBEDQ_POOL": topics.pool or DEFAULT_POOL,
            "EMBEDQ_MODEL": str(model),
            "EMBEDQ_HTTP_PORT": "0",
            # Tests name reply topics of their own; one of them is about the default.
            "EMBEDQ_REPLY_TOPICS": "*",
            # A replica that the machine starves must not lose its partitions for it.
            "EMBEDQ_SESSION_TIMEOUT_MS": f"{patient(6.0) * 1000:.0f}",
            "EMBEDQ_REBALANCE_TIMEOUT_MS": f"{patient(20.0) * 1000:.0f}",
            # A machine that starves its brokers must not cost a job its answer.
            "EMBEDQ_REPLY_TIMEOUT_S": f"{patient(15.0):.0f}",
            # An orderly end on a machine that starves it.
            "EMBEDQ_LEAVE_TIMEOUT_S": f"{patient(15.0):.0f}",
            "EMBEDQ_THREADS": "1",
            **{f"EMBEDQ_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.process: asyncio.subprocess.Process | WarmProcess | None = None

    def in_environment(self, more: Mapping[str, str]) -> Replica:
        """Start it with these variables, too."""
        self._environ |= more
        return self

    async def start(self, *, ready: bool = True) -> Replica:
        """Start the process; with `ready`, wait until it takes jobs."""
        with await asyncio.to_thread(self.log.open, "ab", buffering=0) as log:
            # What a library said at the end of the process before may lack its line end, and would swallow `starting`.
            log.write(b"\n")
            self.process = await self._started(log)
        if ready:
            await self.until_ready()
        return self

    async def _started(self, log: FileIO) -> asyncio.subprocess.Process | WarmProcess:
        if self._python[0] == "-m":
            warm = await asyncio.to_thread(
                warm_start.start, "replica", self._python[1:], self._environ, out=log
            )
            if warm is not None:
                return warm
        return await asyncio.create_subprocess_exec(
            sys.executable, *self._python, env=self._environ, stdout=log, stderr=log
        )

    async def until_ready(self, within: float = 90.0) -> None:
        async def is_ready() -> bool:
            if self.returncode is not None:
                raise AssertionError(f"the replica ended with {self.returncode}:\n{self.tail()}")
            return await self.get("/readyz") == 200

        await wait_until(is_ready, within=within, what="a ready replica")

    @property
    def returncode(self) -> int | None:
        assert self.process is not None
        return self.process.returncode

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def events(self) -> list[dict[str, Any]]:
        """Its log, as far as it is written. Who waits for a line asks fifty times a second: each is decoded once."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            whole, end, _ = log.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        self._events += [msgspec.json.decode(line) for line in whole.splitlines() if line.startswith(b"{")]
        return list(self._events)

    def port(self) -> int | None:
        started = [event for event in self.events() if event["event"] == "starting"]
        return started[-1]["http_port"] if started else None

    async def get(self, path: str) -> int | None:
        """The status of one of its health pages, None while it serves none."""
        status, _ = await asyncio.to_thread(self._get, path)
        return status

    async def page(self, path: str) -> tuple[int | None, str]:
        """The status and text of one of its pages."""
        return await asyncio.to_thread(self._get, path)

    async def metrics(self) -> dict[str, float]:
        """Every sample, by name and labels as Prometheus writes them: `embedq_jobs_total{lane="bulk",status="ok"}`."""
        _, body = await asyncio.to_thread(self._get, "/metrics")
        found = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def _get(self, path: str) -> tuple[int | None, str]:
        port = self.port()
        if port is None:
            return None, ""
        try:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=patient(10)) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
        except (
            OSError,
            http.client.HTTPException,
        ):  # it ends, or was starved for longer than it lets a caller wait
            return None, ""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self, within: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        if self.returncode is None:
            self.kill(signal.SIGTERM)
        return await self.ended(within)

    async def ended(self, within: float = 60.0) -> int:
        assert self.process is not None
        async with asyncio.timeout(patient(within)):
            return await self.process.wait()


@asynccontextmanager
async def replicas(*wanted: Replica) -> AsyncIterator[tuple[Replica, ...]]:
    """Started at once, and gone at the end whatever happens."""
    try:
        await asyncio.gather(*(replica.start() for replica in wanted))
        yield wanted
        if _MEASURED:
            await asyncio.gather(*(_leave(replica) for replica in wanted))
    finally:
        for replica in wanted:
            if replica.process is not None and replica.returncode is None:
                replica.kill()
                await replica.ended()


class End(NamedTuple):
    """A supervised replica's process ended: when, in monotonic seconds, which one, and its exit code."""

    at: float
    replica: Replica
    code: int


@asynccontextmanager
async def supervised(*wanted: Replica) -> AsyncIterator[list[End]]:
    """Replicas that are started again whenever they end, as an orchestrator does it; their ends so far."""
    ends: list[End] = []

    async def supervise(replica: Replica) -> None:
        while True:
            code = await replica.ended(within=10_000)
            ends.append(End(time.monotonic(), replica, code))
            await replica.start(ready=False)

    async with replicas(*wanted):
        watching = [asyncio.create_task(supervise(replica)) for replica in wanted]
        try:
            yield ends
        finally:
            for task in watching:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _leave(replica: Replica) -> None:
    """End a replica so that it writes down what it ran; one that cannot leave (its broker is gone) is killed later."""
    if replica.process is not None:
        with suppress(TimeoutError):
            await replica.stop(_LEAVE_S)


@asynccontextmanager
async def producer(stack: DevStack, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    """A plain producer, as a client without the SDK has one."""
    client = AIOKafkaProducer(
        bootstrap_servers=stack.kafka_servers, max_request_size=20_000_000, linger_ms=2, **options
    )
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


class Reader:
    """Everything on some topics, from the beginning."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.records: list[ConsumerRecord] = []

    async def until(self, count: int, *, within: float = 60.0) -> list[ConsumerRecord]:
        """All records so far, once there are `count` of them."""

        async def enough() -> bool:
            await self.poll()
            return len(self.records) >= count

        # The broker is what waits: what comes is seen as it comes.
        await wait_until(
            enough, within=within, what=f"record {count} (there are {len(self.records)})", longest_pause=0.02
        )
        return self.records

    async def all(self) -> list[ConsumerRecord]:
        """All records up to the end as it is now."""
        await self.poll()
        partitions = list(self._consumer.assignment())
        ends = await self._consumer.end_offsets(partitions)
        for partition in partitions:
            while await self._consumer.position(partition) < ends[partition]:
                await self.poll()
        return self.records

    async def poll(self) -> list[ConsumerRecord]:
        """What came within a tenth of a second, if anything did."""
        came = list(chain.from_iterable((await self._consumer.getmany(timeout_ms=100)).values()))
        self.records += came
        return came


async def partitions_of(admin: AIOKafkaAdminClient, topics: Collection[str]) -> list[TopicPartition]:
    """Every partition of these. A broker may not have heard yet of a topic that was just made."""
    found: list[dict[str, Any]] = []

    async def are_known() -> bool:
        found[:] = await admin.describe_topics(list(topics))
        return all(topic["partitions"] for topic in found)

    await wait_until(are_known, what=f"a broker that knows {topics}")
    return [
        TopicPartition(topic["topic"], its["partition"]) for topic in found for its in topic["partitions"]
    ]


@asynccontextmanager
async def reader(stack: DevStack, *names: str, committed: bool = False) -> AsyncIterator[Reader]:
    """A plain consumer of whole topics; with `committed`, of committed records alone."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=stack.kafka_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed" if committed else "read_uncommitted",
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=16 * 1024 * 1024,
    )
    await consumer.start()
    try:
        admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
        await admin.start()
        try:
            partitions = await partitions_of(admin, names)
        finally:
            await admin.close()
        consumer.assign(partitions)
        await consumer.seek_to_beginning()
        yield Reader(consumer)
    finally:
        await consumer.stop()
