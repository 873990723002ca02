"""Other clients' jobs, at a steady rate, beside somebody's fault: how long each of them waited, client to client.

The rate does not fall while answers stay out, so that a stop of the service is seen by every job that it meets.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaProducer

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Reader, producer, reader
from tests.helpers.support import patient, wait_until

STOPPED_S: Final = 5.0
"""What the p99 of others' waits stays below in a test, in seconds of a quiet machine. A second is promised, and `benchmarks.bad_neighbors`
measures it on a machine of its own; where tests run, a replica may be starved for longer. A service that one client's fault stops
answered nobody for 40 to 82 s."""

_CLIENT: Final = ("client-id", b"a neighbor")


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How long jobs waited, in seconds."""

    jobs: int
    p50_s: float
    p99_s: float
    longest_s: float


def spread(waits: Sequence[float]) -> Spread:
    """Of at least one wait. Of fewer than a hundred the p99 is the longest."""
    ordered = sorted(waits)

    def at(share: float) -> float:
        return round(ordered[int(len(ordered) * share)], 4)

    return Spread(jobs=len(ordered), p50_s=at(0.5), p99_s=at(0.99), longest_s=round(ordered[-1], 4))


class Waits:
    """When each job was sent and answered, in monotonic seconds. Pure."""

    def __init__(self) -> None:
        self._sent: dict[str, float] = {}
        self._answered: dict[str, float] = {}
        self.repeats = 0

    def sent(self, id: str, at: float) -> None:
        """A job is on its way."""
        self._sent[id] = at

    def answered(self, id: str, at: float) -> None:
        """Its answer is there. Answers to what others sent do not count."""
        if id in self._answered:
            self.repeats += 1
        elif id in self._sent:
            self._answered[id] = at

    @property
    def count(self) -> int:
        """How many were answered."""
        return len(self._answered)

    @property
    def open(self) -> set[str]:
        """Those that were not."""
        return self._sent.keys() - self._answered.keys()

    def between(self, since: float, until: float) -> list[float]:
        """Of the jobs that were answered after `since` and sent before `until`: those under way at some time between them."""
        return [
            answered - self._sent[id]
            for id, answered in self._answered.items()
            if answered >= since and self._sent[id] <= until
        ]


class Neighbors:
    """Jobs of one text each, on all partitions of the interactive lane, no two alike."""

    def __init__(
        self, client: AIOKafkaProducer, topics: Topics, results: Reader, *, rate: float, name: str
    ) -> None:
        self._client = client
        self._topic = topics.jobs
        self._results = results
        self._rate = rate
        self._name = name
        self._ending = False
        self._waits = Waits()
        self._running: asyncio.Task[None] | None = None
        self.errors: list[Mapping[str, Any]] = []
        """Answers other than vectors."""

    @property
    def repeats(self) -> int:
        """Answers beyond the first of each job."""
        return self._waits.repeats

    async def run(self) -> None:
        """Send until `finish`, and read until each job has its answer."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            tasks.create_task(self._look())

    def start(self) -> asyncio.Task[None]:
        """Run beside what follows."""
        self._running = asyncio.create_task(self.run())
        return self._running

    async def progress(self, count: int, *, within: float = 60.0) -> None:
        """Wait until `count` more jobs have their answer."""
        wanted = self._waits.count + count
        await self._until(
            lambda: self._waits.count >= wanted, within, f"{count} more answers to others' jobs"
        )

    async def catch_up(self, *, within: float = 60.0) -> None:
        """Wait until each job that was sent by now has its answer."""
        sent = self._waits.open
        await self._until(
            lambda: not sent & self._waits.open, within, f"answers to {len(sent)} of others' jobs"
        )

    async def _until(self, ready: Callable[[], bool], within: float, what: str) -> None:
        def is_ready() -> bool:
            if self._running is not None and self._running.done():
                self._running.result()
            return ready()

        await wait_until(is_ready, within=within, what=what)

    def finish(self) -> None:
        """Send no more."""
        self._ending = True

    def waited(self, since: float, until: float = math.inf) -> Spread:
        """How long the jobs waited that were under way at some time between these, in monotonic seconds."""
        return spread(self._waits.between(since, until))

    async def _send(self) -> None:
        partitions = sorted(await self._client.partitions_for(self._topic))
        written: list[asyncio.Future[Any]] = []
        began = time.monotonic()
        while not self._ending:
            number = len(written)
            id = f"{self._name}-{number}"
            job = {"id": id, "input": f"the text of {id}", "dimensions": 32}
            self._waits.sent(id, time.monotonic())
            written.append(
                await self._client.send(
                    self._topic,
                    json.dumps(job).encode(),
                    partition=partitions[number % len(partitions)],
                    headers=[_CLIENT],
                )
            )
            await asyncio.sleep(max(0.0, began + len(written) / self._rate - time.monotonic()))
        await asyncio.gather(*written)

    async def _look(self) -> None:
        while not self._ending or self._waits.open:
            came = await self._results.poll()
            now = time.monotonic()
            for record in came:
                answer = json.loads(record.value)
                if answer["id"].startswith(f"{self._name}-") and answer["object"] == "error":
                    self.errors.append(answer)
                self._waits.answered(answer["id"], now)


@asynccontextmanager
async def neighbors(
    stack: DevStack, topics: Topics, *, rate: float = 50.0, name: str = "other"
) -> AsyncIterator[Neighbors]:
    """Others' jobs beside the block, so many a second; at its end each of them has its answer."""
    async with producer(stack, enable_idempotence=True) as client, reader(stack, topics.results) as results:
        others = Neighbors(client, topics, results, rate=rate, name=name)
        running = others.start()
        try:
            yield others
            others.finish()
            async with asyncio.timeout(patient(120)):
                await running
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def assert_served(others: Neighbors, since: float, record_property: Callable[[str, object], None]) -> None:
    """Nobody stopped for somebody else's fault that began then; the test's record has how long they waited."""
    waited = others.waited(since)
    record_property("others", msgspec.to_builtins(waited))
    assert waited.jobs >= 100, "too few jobs for a p99"
    assert waited.p99_s < patient(STOPPED_S), waited
    assert not others.errors
