"""A group of workers under a steady load, and what its jobs went through: lost, repeated, and how long they waited."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Reader, producer, reader
from tests.helpers.support import patient, wait_until

ROOT = Path(__file__).parents[2]


def say(measured: str) -> None:
    """A figure for whoever runs the tests with `-s`."""
    sys.stderr.write(f"\n{measured}\n")


class Worker:
    """One process of `group_worker`."""

    def __init__(self, stack: DevStack, topics: Topics, folder: Path, replica: str, **options: Any) -> None:
        self.replica = replica
        self._arguments: dict[str, Any] = {
            "servers": stack.kafka_servers,
            "prefix": topics.prefix,
            "replica": replica,
            "session_timeout_ms": round(patient(6.0) * 1000),
            "rebalance_timeout_ms": round(patient(20.0) * 1000),
        } | options
        self._log = folder / f"{replica}.log"
        self.process: asyncio.subprocess.Process | None = None

    @property
    def session_s(self) -> float:
        found: int = self._arguments["session_timeout_ms"]
        return found / 1000

    async def start(self, *, joined: bool = True) -> Worker:
        with await asyncio.to_thread(self._log.open, "ab", buffering=0) as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.helpers.group_worker",
                json.dumps(self._arguments),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        if joined:
            before = self.count("joined")
            await wait_until(
                lambda: self.count("joined") > before or self.process_ended(), within=60, what="a join"
            )
            assert not self.process_ended(), self._log.read_text()
        return self

    def process_ended(self) -> bool:
        return self.process is None or self.process.returncode is not None

    def events(self) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def count(self, event: str) -> int:
        return sum(found["event"] == event for found in self.events())

    async def until(self, event: str, times: int = 1) -> None:
        await wait_until(lambda: self.count(event) >= times, within=60, what=f"{event} of {self.replica}")

    def generations(self) -> list[int]:
        return [found["generation"] for found in self.events() if found["event"] == "partitions_assigned"]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.kill(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(patient(60)):
            return await self.process.wait()


class SteadyLoad:
    """Jobs at a steady rate, spread evenly over the partitions, and every result."""

    def __init__(self, client: AIOKafkaProducer, topics: Topics, results: Reader, rate: float) -> None:
        self.topics = topics
        self.ids: list[str] = []
        self._client = client
        self._results = results
        self._rate = rate
        self._ending = False

    async def run(self) -> None:
        partitions = sorted(await self._client.partitions_for(self.topics.jobs))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        sent = []
        while not self._ending:
            while len(self.ids) < (loop.time() - begun) * self._rate:
                number = len(self.ids)
                job = {"id": f"job-{number}", "input": "x"}
                self.ids.append(job["id"])
                sent.append(
                    await self._client.send(
                        self.topics.jobs,
                        json.dumps(job).encode(),
                        key=job["id"].encode(),
                        partition=partitions[number % len(partitions)],
                    )
                )
            await asyncio.sleep(0.01)
        await asyncio.gather(*sent)

    def finish(self) -> None:
        self._ending = True

    async def progress(self, count: int) -> None:
        """So many more jobs are answered."""
        target = len(await self.results()) + count

        async def enough() -> bool:
            return len(await self.results()) >= target

        await wait_until(enough, within=90, what=f"{count} more answers")

    async def answered(self) -> None:
        """All jobs are."""

        async def all_are() -> bool:
            found = {result["id"] for result in await self.results()}
            return found >= set(self.ids)

        await wait_until(all_are, within=120, what="all answers")

    async def results(self) -> list[dict[str, Any]]:
        return [json.loads(record.value) for record in await self._results.all()]

    async def partitions_of(self, worker: Worker, since: int) -> set[str]:
        """The partitions of which it answered something after the result of this number."""
        return {
            result["partition"]
            for result in (await self.results())[since:]
            if result["worker"] == worker.replica
        }

    async def repeated(self) -> int:
        counts = Counter(result["id"] for result in await self.results())
        return counts.total() - len(counts)

    async def longest_wait(
        self, *, since: int = 0, of: Collection[str] | None = None, but: Collection[str] = ()
    ) -> float:
        """Seconds from a job to its first answer, at most, of some partitions or of all but some."""
        first: dict[str, float] = {}
        for result in (await self.results())[since:]:
            if result["partition"] not in but and (of is None or result["partition"] in of):
                first.setdefault(result["id"], result["age"])
        return max(first.values(), default=0.0)


@asynccontextmanager
async def steady_load(stack: DevStack, topics: Topics, rate: float = 200.0) -> AsyncIterator[SteadyLoad]:
    """Run a load alongside the block."""
    async with producer(stack, enable_idempotence=True) as client, reader(stack, topics.results) as results:
        load = SteadyLoad(client, topics, results, rate)
        task = asyncio.create_task(load.run())
        try:
            yield load
        finally:
            load.finish()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def workers(*wanted: Worker) -> AsyncIterator[None]:
    """Started at once, and gone at the end whatever happens."""
    try:
        await asyncio.gather(*(worker.start() for worker in wanted))
        yield
    finally:
        for worker in wanted:
            if not worker.process_ended():
                worker.kill(signal.SIGCONT)
                worker.kill()
                await worker.ended()
