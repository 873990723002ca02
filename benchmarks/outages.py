"""What an outage costs: a worker killed, Redis away, Kafka away.

    python -m benchmarks.outages worker    # SIGKILL of one of three: how long until the lag falls again
    python -m benchmarks.outages redis     # Redis dead, then frozen: throughput, next to that without a cache at all
    python -m benchmarks.outages kafka     # Kafka gone for three minutes: the same process, nothing lost, when it goes on

all-MiniLM-L6-v2 on a Kafka and a Redis of their own. Prints a table, writes it as JSON below benchmarks/results, and ends
with code 1 if the promise is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks.crash import job
from benchmarks.machine import write
from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, preload, uncommitted, until_committed
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.tiny_models import minilm_path

_PARTITIONS = 6
_SESSION_S = 6.0
_ALLOWED_BEYOND_SESSION_S = 2.0
_LEAST_SHARE = 0.9
_RESUME_S = 15.0

Figures = tuple[dict[str, Any], bool]


async def worker(stack: DevStack, options: argparse.Namespace, directory: Path) -> Figures:
    """Jobs come at a steady rate; one of three workers is killed for good. When is the lag at its highest?"""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    workers = [
        Replica(
            stack,
            topics,
            minilm_path(),
            directory / f"{number}.log",
            session_timeout_ms=int(_SESSION_S * 1000),
        )
        for number in range(3)
    ]
    lag: list[tuple[float, int]] = []
    async with replicas(*workers), producer(stack, enable_idempotence=True) as client:
        sending = asyncio.create_task(_steadily(client, topics.jobs, options.rate))
        started = time.monotonic()
        try:
            await _watch(lag, 10.0, lambda: uncommitted(stack, topics), started)
            workers[0].kill()
            killed = time.monotonic() - started
            await _watch(lag, _SESSION_S + 20.0, lambda: uncommitted(stack, topics), started)
        finally:
            sending.cancel()
        await until_committed(stack, topics, within=120)
    after = [(at - killed, jobs) for at, jobs in lag if at >= killed]
    peak_at, peak = max(after, key=lambda sample: sample[1])
    figures = {
        "jobs_per_second_sent": options.rate,
        "session_timeout_s": _SESSION_S,
        "lag_before": max(jobs for at, jobs in lag if at < killed),
        "lag_at_its_highest": peak,
        "seconds_from_the_kill_to_there": round(peak_at, 2),
        "lag_at_the_end": after[-1][1],
    }
    return figures, peak_at <= _SESSION_S + _ALLOWED_BEYOND_SESSION_S and after[-1][1] < peak


async def _steadily(client: Any, topic: str, rate: float) -> None:
    started, number = time.monotonic(), 0
    while True:
        await client.send(
            topic, json.dumps(job(number)).encode(), key=str(number).encode(), partition=number % _PARTITIONS
        )
        number += 1
        await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))


async def _watch(
    lag: list[tuple[float, int]],
    seconds: float,
    measure: Callable[[], Coroutine[Any, Any, int]],
    started: float,
) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lag.append((time.monotonic() - started, await measure()))
        await asyncio.sleep(0.1)


async def redis(stack: DevStack, options: argparse.Namespace, directory: Path) -> Figures:
    """Texts that nobody has asked for before: without a cache, with Redis well, dead, and frozen; in turn, twice."""
    seconds: dict[str, list[float]] = {"no_cache": [], "well": [], "dead": [], "frozen": []}
    for turn in range(2):
        for name, times in seconds.items():
            if name == "dead":
                await asyncio.to_thread(stack.stop_redis, kill=True)
            if name == "frozen":
                await asyncio.to_thread(stack.pause_redis)
            try:
                times.append(
                    await _drain_time(stack, options.jobs, directory / f"{turn}-{name}", name != "no_cache")
                )
            finally:
                if name == "dead":
                    await asyncio.to_thread(stack.start_redis)
                if name == "frozen":
                    await asyncio.to_thread(stack.resume_redis)
    rates = {name: round(options.jobs / min(times), 1) for name, times in seconds.items()}
    share = {name: round(rates[name] / rates["no_cache"], 3) for name in ("dead", "frozen")}
    return {"jobs": options.jobs, "jobs_per_second": rates, "share_of_the_uncached": share}, (
        min(share.values()) >= _LEAST_SHARE
    )


async def _drain_time(stack: DevStack, jobs: int, log: Path, cached: bool) -> float:
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    # The service that is measured is started before its jobs are there; the first ones warm it up.
    replica = Replica(stack, topics, minilm_path(), log, redis=cached)
    async with replicas(replica), reader(stack, topics.results) as results:
        answered = Answered(results)
        warm = await preload(stack, topics.jobs, 200, lambda n: job(n) | {"id": f"warm-{n}"})
        await answered.until(warm, within=300)
        started = time.monotonic()
        ids = await preload(
            stack, topics.jobs, jobs, lambda n: job(n) | {"input": f"{log.name} {job(n)['input']}"}
        )
        await answered.until(ids, within=600)
        return time.monotonic() - started


async def kafka(stack: DevStack, options: argparse.Namespace, directory: Path) -> Figures:
    """The broker is killed while jobs wait, and started again after a while."""
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    replica = Replica(stack, topics, minilm_path(), directory / "log")
    async with replicas(replica):
        pid = replica.pid
        async with reader(stack, topics.results) as results:
            ids = await preload(stack, topics.jobs, options.jobs, job)
            answered = Answered(results)
            await answered.some(options.jobs // 4, within=300)
        await asyncio.to_thread(stack.stop_kafka, kill=True)
        await asyncio.sleep(options.seconds)  # the outage itself
        ready = await replica.get("/readyz")
        await asyncio.to_thread(stack.start_kafka)
        back = time.monotonic()
        async with reader(stack, topics.results) as results:
            answered = Answered(results)
            before = len(await answered.all())
            await answered.some(before + 1, within=120)
            resumed = time.monotonic() - back
            await answered.until(ids, within=600)
            await until_committed(stack, topics, within=60)
            lost = len(set(ids) - set(answered.counts()))
            repeats = answered.duplicates()
        same = replica.returncode is None and replica.pid == pid
        code = await replica.stop()
    figures = {
        "jobs": options.jobs,
        "seconds_away": options.seconds,
        "same_process": same,
        "ready_while_away": ready,
        "seconds_until_it_goes_on": round(resumed, 2),
        "lost": lost,
        "repeated": repeats,
        "exit_code": code,
    }
    return figures, same and not lost and resumed <= _RESUME_S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outage", choices=["worker", "redis", "kafka"])
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=60.0, help="jobs a second (worker)")
    parser.add_argument("--seconds", type=float, default=180.0, help="how long Kafka is away")
    options = parser.parse_args()
    measure = {"worker": worker, "redis": redis, "kafka": kafka}[options.outage]
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as directory:
        where = {"kafka": stack.kafka_description, "redis": stack.redis_description}
        figures, kept = asyncio.run(measure(stack, options, Path(directory)))
    found = {"model": "all-MiniLM-L6-v2", **figures, "kept": kept, **where}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write(f"outage_{options.outage}", found, "embedq", "torch", "aiokafka")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
