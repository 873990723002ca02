"""A batch of many lines through `/v1/batches`, with the gateway killed half-way: is it complete, and what does the kill cost?

    python -m benchmarks.batches --lines 50000                   # a tiny model, a directory for the files
    python -m benchmarks.batches --lines 50000 --storage s3      # the same with a server that speaks S3 (moto's)

One Kafka, one replica, openai's client. The gateway is killed with SIGKILL once half of the lines are done; another one that
shares the storage goes on. Prints a table, writes it as JSON below benchmarks/results, and ends with code 1 if a line is
missing or there twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import openai
import psutil

from benchmarks.machine import write
from embedq_sdk.dev import DevStack
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.s3_server import BUCKET, s3_server
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.tiny_models import make_tiny_bert

_LEASE_S: Final = 15.0
"""The gateway's default."""
_LOOK_S: Final = 0.1


def lines(count: int) -> bytes:
    """The input file: one text of a few words a line, each its own."""
    made = (
        {
            "custom_id": f"row-{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "default", "input": f"{n} tides turn twice a day"},
        }
        for n in range(count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def memory_mib(gateway: GatewayProcess) -> float:
    """What it has resident now."""
    assert gateway.process is not None
    return float(psutil.Process(gateway.process.pid).memory_info().rss / 2**20)


async def completed(client: openai.AsyncOpenAI, batch: str) -> tuple[str, int]:
    """The batch's status, and how many of its lines are done."""
    found = await client.batches.retrieve(batch)
    return found.status, 0 if found.request_counts is None else found.request_counts.completed


async def measure(stack: DevStack, place: str, count: int, directory: Path) -> dict[str, Any]:
    """One batch with one kill."""
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(
        stack, topics, make_tiny_bert(directory / "model"), directory / "replica.log", redis=False
    )
    settings: dict[str, Any] = {"files": place, "batch_lease_s": _LEASE_S, "access_log": False}
    first, second = (
        GatewayProcess(stack, topics, directory / f"{name}.log", **settings) for name in ("first", "second")
    )
    figures: dict[str, Any] = {"lines": count, "lease_s": _LEASE_S}
    async with replicas(replica):
        await first.start()
        async with openai.AsyncOpenAI(base_url=f"{first.url}/v1", api_key="none", timeout=300) as client:
            started = time.monotonic()
            file = await client.files.create(file=("rows.jsonl", lines(count)), purpose="batch")
            figures["upload_s"] = round(time.monotonic() - started, 2)
            made = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
            )
            began, before, rss = time.monotonic(), 0, 0.0
            while before < count // 2:
                await asyncio.sleep(_LOOK_S)
                _, before = await completed(client, made.id)
                rss = max(rss, memory_mib(first))
        first.kill()
        killed = time.monotonic()
        await first.ended()
        figures |= {
            "lines_at_the_kill": before,
            "lines_per_second_before": round(before / (killed - began), 1),
        }
        async with (
            running(second),
            openai.AsyncOpenAI(base_url=f"{second.url}/v1", api_key="none", timeout=300) as client,
        ):
            ready, went_on, last = time.monotonic(), None, before
            while True:
                status, done = await completed(client, made.id)
                rss = max(rss, memory_mib(second))
                if went_on is None and done > last:
                    went_on = time.monotonic()
                if status != "in_progress" and status != "finalizing":
                    break
                await asyncio.sleep(_LOOK_S)
            ended = time.monotonic()
            batch = await client.batches.retrieve(made.id)
            content = await client.files.content(batch.output_file_id or "")
            figures["download_s"] = round(time.monotonic() - ended, 2)
        ids = Counter(json.loads(line)["custom_id"] for line in content.content.splitlines())
        computed = sum(
            value for name, value in (await replica.metrics()).items() if name.startswith("embedq_jobs_total")
        )
    figures |= {
        "status": status,
        "seconds_from_the_kill_to_a_ready_gateway": round(ready - killed, 2),
        "seconds_from_there_to_the_next_counted_line": None if went_on is None else round(went_on - ready, 2),
        "seconds_in_all": round(ended - began, 1),
        "output_mib": round(len(content.content) / 2**20, 1),
        "lines_in_the_output": sum(ids.values()),
        "custom_ids_in_the_output": len(ids),
        "custom_ids_missing": count - len({f"row-{n}" for n in range(count)} & ids.keys()),
        "custom_ids_twice": sum(times > 1 for times in ids.values()),
        "jobs_that_the_service_answered": int(computed),
        "largest_memory_of_a_gateway_mib": round(rss, 1),
    }
    return figures


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--storage", choices=("directory", "s3"), default="directory")
    options = parser.parse_args()
    with ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="embedq-batches-")))
        place = str(directory / "files")
        if options.storage == "s3":
            os.environ.update(held.enter_context(s3_server()))
            place = f"s3://{BUCKET}/benchmark"
        stack = held.enter_context(DevStack())
        figures = asyncio.run(measure(stack, place, options.lines, directory))
    figures["storage"] = options.storage
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<50}{value}")
    whole = figures["status"] == "completed" and figures["lines_in_the_output"] == options.lines
    whole = whole and not figures["custom_ids_missing"] and not figures["custom_ids_twice"]
    if whole:
        print(write(f"batches-{options.storage}", figures, "starlette", "uvicorn", "openai", "boto3"))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
