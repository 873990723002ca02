"""Replicas against a backlog of cached jobs: `python -m benchmarks.backlog --jobs 1000000 --partitions 6`.

The texts are put into the cache, then the jobs are written; only then the replicas start, and no client runs. Answers are counted
by the end offsets of the results topic, so that nothing but the brokers, Redis and the replicas takes processor time. What is
steady lies between the first and the last tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.machine import write
from benchmarks.pipeline import minilm, replica, stream
from benchmarks.texts import distinct
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics

_JOBS_A_BATCH: Final = 500
_LOOK_S: Final = 0.5
_PATIENCE_S: Final = 120.0
"""Without one more answer."""
_KAFKA: Final = {
    # A million results are some 2.5 GB; what was answered and counted may go.
    "log.segment.bytes": str(32 << 20),
    "log.retention.bytes": str(256 << 20),
    "log.retention.check.interval.ms": "5000",
}


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica's metrics page says."""

    processor_s: float
    memory_mb: float
    micro_batches: float
    cache: dict[str, float]


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What was to be seen at one moment; of each replica processor seconds, megabytes, and what the cache said of look-ups."""

    at: float
    answered: int
    replicas: list[Usage]


async def write_jobs(servers: str, texts: Sequence[str], jobs: int, partitions: int) -> None:
    """One short text a job, evenly over the partitions; the results go to the results topic."""
    topic = Topics().jobs
    values = [json.dumps({"input": text, "encoding_format": "base64"}).encode() for text in texts]
    headers = [("correlation-id", b"backlog")]
    producer = AIOKafkaProducer(bootstrap_servers=servers, max_batch_size=500_000)
    await producer.start()
    try:
        for number, first in enumerate(range(0, jobs, _JOBS_A_BATCH)):
            batch = producer.create_batch()
            for job in range(first, min(jobs, first + _JOBS_A_BATCH)):
                batch.append(key=None, value=values[job % len(values)], timestamp=None, headers=headers)
            await producer.send_batch(batch, topic, partition=number % partitions)
        await producer.flush()
    finally:
        await producer.stop()


async def answers(servers: str, addresses: Sequence[str], jobs: int, partitions: int) -> list[Look]:
    """Looks until all jobs are answered."""
    topic = Topics().results
    consumer = AIOKafkaConsumer(bootstrap_servers=servers)
    await consumer.start()
    try:
        places = [TopicPartition(topic, at) for at in range(partitions)]
        looks: list[Look] = []
        moved = time.monotonic()
        while not looks or looks[-1].answered < jobs:
            answered = sum((await consumer.end_offsets(places)).values())
            seen = [await asyncio.to_thread(_usage, address) for address in addresses]
            looks.append(Look(at=time.monotonic(), answered=answered, replicas=seen))
            if len(looks) < 2 or answered > looks[-2].answered:
                moved = looks[-1].at
            elif looks[-1].at - moved > _PATIENCE_S:
                raise RuntimeError(f"{answered:,} of {jobs:,} jobs were answered, and no more")
            await asyncio.sleep(_LOOK_S)
        return looks
    finally:
        await consumer.stop()


def _usage(address: str) -> Usage:
    with urllib.request.urlopen(f"{address}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    look_ups = "embedq_cache_lookups_total"
    return Usage(
        processor_s=found["process_cpu_seconds_total"],
        memory_mb=found["process_resident_memory_bytes"] / 1e6,
        micro_batches=found["embedq_batch_items_count"],
        cache={name.split('"')[1]: value for name, value in found.items() if name.startswith(look_ups)},
    )


def summary(looks: Sequence[Look], jobs: int) -> dict[str, Any]:
    """Rates, and memory early, half-way and late."""
    last = next(look for look in looks if look.answered >= jobs)
    steady = [look for look in looks if jobs // 10 <= look.answered <= jobs - jobs // 10]
    found: dict[str, Any] = {
        "seconds": round(last.at - looks[0].at, 1),
        "micro_batches": sum(its.micro_batches for its in last.replicas),
        "cache": dict(sum((Counter(its.cache) for its in last.replicas), Counter[str]())),
    }
    if len(steady) < 2 or steady[0].answered == steady[-1].answered:
        return found | {"jobs_per_s": round(jobs / (last.at - looks[0].at), 1)}
    begin, end = steady[0], steady[-1]
    middle = steady[len(steady) // 2]
    rates = [
        (two.answered - one.answered) / (two.at - one.at)
        for one, two in ((begin, middle), (middle, end))
        if two.at > one.at
    ]
    spent = sum(its.processor_s for its in end.replicas) - sum(its.processor_s for its in begin.replicas)
    return found | {
        "steady_jobs_per_s": round((end.answered - begin.answered) / (end.at - begin.at), 1),
        "steady_jobs_per_s_by_half": [round(rate, 1) for rate in rates],
        "processor_us_a_job": round(spent / (end.answered - begin.answered) * 1e6, 1),
        "memory_mb_early_middle_late": [
            [round(its.memory_mb, 1) for its in look.replicas] for look in (begin, middle, end)
        ],
    }


async def against_backlog(
    stack: DevStack,
    model: Path,
    scratch: Path,
    texts: Sequence[str],
    *,
    jobs: int,
    partitions: int,
    replicas: int,
) -> dict[str, Any]:
    """Jobs of cached texts, written before as many replicas start."""
    await write_jobs(stack.kafka_servers, texts, jobs, partitions)
    async with AsyncExitStack() as running:
        starting = [
            asyncio.create_task(
                running.enter_async_context(replica(stack, model, scratch / f"replica-{number}"))
            )
            for number in range(replicas)
        ]
        addresses = await asyncio.gather(*starting)
        looks = await answers(stack.kafka_servers, addresses, jobs, partitions)
    return {"jobs": jobs, "partitions": partitions, "replicas": replicas} | summary(looks, jobs)


async def run(
    model: Path, texts: int, jobs: int, partitions: int, replicas: int, brokers: int
) -> dict[str, Any]:
    """One backlog."""
    with (
        DevStack(brokers=brokers, kafka_properties=_KAFKA) as stack,
        tempfile.TemporaryDirectory() as scratch,
    ):
        await create_topics(stack.kafka_servers, partitions=partitions, reply_partitions=4)
        cached = distinct(texts, "b0.")
        async with (
            replica(stack, model, Path(scratch) / "first"),
            EmbedClient(stack.kafka_servers) as client,
        ):
            await stream(client, cached, 32)
        found = await against_backlog(
            stack, model, Path(scratch), cached, jobs=jobs, partitions=partitions, replicas=replicas
        )
        return {"model": model.parent.name, "brokers": brokers, "kafka": stack.kafka_description} | found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--texts", type=int, default=1500, help="different texts, all of them cached")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=6, help="of the job and result topics")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--brokers", type=int, default=1)
    its = parser.parse_args()
    found = asyncio.run(
        run(its.model or minilm(), its.texts, its.jobs, its.partitions, its.replicas, its.brokers)
    )
    print(json.dumps(found, indent=2))
    name = f"backlog-{its.jobs}-p{its.partitions}-r{its.replicas}"
    print(f"written to {write(name, found, 'embedq', 'aiokafka', 'redis', 'msgspec')}")


if __name__ == "__main__":
    main()
