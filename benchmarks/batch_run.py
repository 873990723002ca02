"""`embedq run` on many short rows, from Parquet to Parquet: rows a second beside the SDK's bare stream, memory, and what kills leave.

A Kafka of its own, and replicas of a tiny random model (`--replicas 0`: a fake service that sends zeros, for the client alone). The
runner, a replica and the broker are killed with SIGKILL at random points (`--kills 1` each), and the same command ends the run. Then
each id must be there once, and a sample of vectors must be what the service gives for the text.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import write
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.store import glance
from embedq_sdk import EmbedClient
from embedq_sdk.dev import DevStack
from tests.helpers.service_process import Replica, fresh_prefix, make_topics
from tests.helpers.tiny_models import make_tiny_bert

_WORDS: Final = [
    "river",
    "moon",
    "stone",
    "bread",
    "window",
    "letter",
    "garden",
    "winter",
    "engine",
    "paper",
    "silver",
    "market",
]
_PROGRAM: Final = "from embedq_batch.command import run; run(prog_name='embedq run')"
_SERVED: Final = "import asyncio, sys; from tests.helpers.responder import Responder\n" + (
    "async def serve():\n"
    "    async with Responder(sys.argv[1], sys.argv[2], keep=False, compute=False):\n"
    "        print('ready', flush=True)\n"
    "        await asyncio.Event().wait()\n"
    "asyncio.run(serve())"
)
_LOOKED_S: Final = 0.2
_SAMPLE: Final = 2000


def text(number: int) -> str:
    """Six words that no other row has."""
    words = [_WORDS[number // len(_WORDS) ** place % len(_WORDS)] for place in range(4)]
    return f"{' '.join(words)} number {number}"


def make_source(path: Path, rows: int) -> None:
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100_000):
            ids = range(start, min(start + 100_000, rows))
            writer.write_table(pa.table({"id": list(ids), "text": [text(n) for n in ids]}, schema=schema))


async def bare_stream(client: EmbedClient, rows: int) -> float:
    """Rows a second of the SDK's stream, on texts of its own, in the same lane and with jobs of the same size."""
    texts = (f"{text(n)} once" for n in range(rows))
    started = time.monotonic()
    count = 0
    async for _ in client.stream(
        texts, lane="bulk", batch_size=64, in_flight=4096, ordered=True, timeout=86_400
    ):
        count += 1
    return count / (time.monotonic() - started)


class Runner:
    """The command as a process, and the memory that it took."""

    def __init__(self, environ: dict[str, str], *arguments: str) -> None:
        self._command = [sys.executable, "-c", _PROGRAM, *arguments]
        self._environ = os.environ | environ
        self.memory: list[tuple[int, int]] = []
        """Rows that were done, and bytes resident then, at each look."""

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=self._environ, stderr=subprocess.PIPE)

    def look(self, done: int) -> None:
        try:
            self.memory.append((done, psutil.Process(self.process.pid).memory_info().rss))
        except psutil.NoSuchProcess:
            return


def rows_done(manifest: Path) -> int:
    try:
        return glance(manifest)[2].done
    except sqlite3.Error:
        return 0


async def until(runner: Runner, manifest: Path, reached: Callable[[int], bool]) -> bool:
    """Wait until the manifest has so many rows; False when the process ended before."""
    looks = 0
    while runner.process.poll() is None:
        if looks % 10 == 0:
            done = await asyncio.to_thread(rows_done, manifest)
            runner.look(done)
            if reached(done):
                return True
        looks += 1
        await asyncio.sleep(_LOOKED_S)
    return False


async def measured(stack: DevStack, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    topics = await make_topics(stack, fresh_prefix())
    environ = {"EMBEDQ_KAFKA_SERVERS": stack.kafka_servers, "EMBEDQ_TOPIC_PREFIX": topics.prefix}
    source, out = folder / "in.parquet", folder / "out.parquet"
    manifest = folder / "out.parquet.embedq" / MANIFEST
    make_source(source, options.rows)
    async with AsyncExitStack() as exits:
        replicas = [
            Replica(stack, topics, make_tiny_bert(folder / "model"), folder / f"replica{n}.log", redis=False)
            for n in range(options.replicas)
        ]
        for replica in replicas:
            await replica.start()
        fake = None
        if not replicas:
            fake = subprocess.Popen(  # noqa: ASYNC220  # nothing else waits yet
                [sys.executable, "-c", _SERVED, stack.kafka_servers, topics.prefix], stdout=subprocess.PIPE
            )
            exits.callback(fake.kill)
            assert fake.stdout is not None
            await asyncio.to_thread(fake.stdout.readline)
        client = await exits.enter_async_context(EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix))
        streamed = [await bare_stream(client, options.streamed)]
        runner = Runner(
            environ, *("--from", str(source), "--to", str(out), "--id-column", "id", "--check", "1000")
        )
        chance = random.Random(options.seed)
        points = sorted(chance.uniform(0.1, 0.9) for _ in range(3)) if options.kills else []
        victims = ["runner", "replica", "broker"]
        chance.shuffle(victims)
        killed = []
        started = time.monotonic()
        runner.start()
        for victim, point in zip(victims, points, strict=False):
            target = point * options.rows
            await until(runner, manifest, lambda done, target=target: done >= target)  # type: ignore[misc]
            killed.append({"victim": victim, "rows_done": await asyncio.to_thread(rows_done, manifest)})
            print(f"{victim} killed at {killed[-1]['rows_done']:,} rows", flush=True)
            if victim == "runner":
                runner.process.kill()
                await asyncio.to_thread(runner.process.communicate)
                runner.start()
            elif victim == "replica" and replicas:
                replicas[0].kill()
                await replicas[0].ended()
                await replicas[0].start(ready=False)
            elif victim == "broker":
                await asyncio.to_thread(stack.stop_kafka, kill=True)
                await asyncio.to_thread(stack.start_kafka)
        await until(runner, manifest, lambda done: False)
        said = (await asyncio.to_thread(runner.process.communicate))[1].decode()
        seconds = time.monotonic() - started
        print(said, flush=True)
        streamed.append(await bare_stream(client, options.streamed))
        wrong = await compared(client, out, options.rows) if replicas else 0
        for replica in replicas:
            await replica.stop()
    ids = pq.read_table(out, columns=["id"]).column("id").to_numpy()
    settled = [rss for done, rss in runner.memory if done > options.rows / 10]
    return {
        "rows": options.rows,
        "service": f"{options.replicas} replicas of a tiny BERT"
        if options.replicas
        else "fake, zeros of 64 dimensions",
        "exit_code": runner.process.returncode,
        "said": said.splitlines(),
        "killed": killed,
        "seconds": round(seconds, 1),
        "rows_a_second": round(options.rows / seconds),
        "stream_rows_a_second": [round(rate) for rate in streamed],
        "share_of_the_stream": round(options.rows / seconds / (sum(streamed) / 2), 3),
        "ids": len(ids),
        "ids_once": bool(np.array_equal(np.sort(ids), np.arange(options.rows))),
        "sample": _SAMPLE if options.replicas else 0,
        "wrong_vectors": wrong,
        "memory_mib": [round(min(settled) / 2**20), round(max(settled) / 2**20)] if settled else [],
    }


async def compared(client: EmbedClient, out: Path, rows: int) -> int:
    """How many of a sample of vectors are not what the service gives."""
    chosen = sorted(random.Random(1).sample(range(rows), min(rows, _SAMPLE)))
    wanted = await client.embed_many([text(n) for n in chosen], lane="bulk")
    stored: dict[int, Any] = {}
    for batch in _batches(out):
        ids = batch.column("id").to_pylist()
        vectors = batch.column("vector").flatten().to_numpy().reshape(len(ids), -1)
        stored.update({id: vectors[n] for n, id in enumerate(ids) if id in set(chosen)})
    return sum(float(np.dot(stored[n], vector)) < 0.9999 for n, vector in zip(chosen, wanted, strict=True))


def _batches(out: Path) -> Iterator[Any]:
    with pq.ParquetFile(out) as file:
        yield from file.iter_batches(50_000, columns=["id", "vector"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--streamed", type=int, default=50_000, help="rows of the bare stream, before and after"
    )
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="batch_run")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measured(stack, options, Path(folder)))
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write(options.name, found, "embedq", "pyarrow", "aiokafka")
    return 0 if found["exit_code"] == 0 and found["ids_once"] and not found["wrong_vectors"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
