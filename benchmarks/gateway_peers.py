"""What many peers cost a gateway: do idle and slow ones delay the others, and does its memory grow with the requests?

    python -m benchmarks.gateway_peers crowd      # 2,000 idle connections and 200 that send a byte a second
    python -m benchmarks.gateway_peers memory     # resident memory over 200,000 requests, some of them broken or given up

A real Kafka, one gateway process behind keys, and in the place of a service one that answers at once (`tests.helpers.responder`): what is
measured is the gateway. Crowd and load are processes of their own. The crowd comes and goes in turns, so that both halves of the
comparison see the same machine. Latency is from the moment at which a request was due, however late it could be sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.http_load import Connection, post
from benchmarks.machine import write
from embedq_gateway.keys.key_file import KeyEntry, add_key, hash_of
from embedq_sdk.admin import create_topics
from embedq_sdk.dev import DevStack

KEY = "a-key-for-the-benchmark"
IDLE, SLOW = 2000, 200
RATE, ROUND_S, ROUNDS = 50, 15.0, 4
REQUESTS, SAMPLES, AT_ONCE = 200_000, 40, 32
WARM = 20_000
"""Requests after which the memory's first sample counts: buffers, pools and the interpreter's own arenas have their size then."""


_KEY = f"authorization: Bearer {KEY}"
GOOD = post("/v1/embeddings", {"input": "the tide turns twice a day", "encoding_format": "base64"}, _KEY)
BROKEN = GOOD.replace(b'"input":', b'"input";')
LONG = post("/v1/embeddings", {"input": "x" * 10_000}, _KEY)


# -- the crowd: a process of its own -----------------------------------------------------------------------------------


async def crowd(port: int, idle: int, slow: int) -> None:
    """Connect all, say so, and stay until killed."""
    resting = [Connection(port) for _ in range(idle)]
    livez = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for group in range(0, idle, 100):
        await asyncio.gather(*(each.ask(livez) for each in resting[group : group + 100]))
    dribbling = [asyncio.create_task(dribble(port, n)) for n in range(slow)]
    await asyncio.sleep(2)
    print("there", flush=True)
    await asyncio.gather(*dribbling)


async def dribble(port: int, number: int) -> None:
    """A byte a second of a head, or of a body; when the gateway has enough of it, again."""
    data = GOOD if number % 2 else LONG
    await asyncio.sleep(random.random())
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            start = 0 if number % 2 else len(data) - 10_000
            writer.write(data[:start])
            for n in range(start, len(data)):
                writer.write(data[n : n + 1])
                await asyncio.sleep(1)
                if writer.transport.is_closing():
                    break
            writer.close()
        except ConnectionError:
            await asyncio.sleep(1)


# -- the load: a process of its own ------------------------------------------------------------------------------------


async def load(port: int, rate: float, seconds: float) -> list[float]:
    """Milliseconds of each request that was due, at a steady rate over as many connections as it needs."""
    free: list[Connection] = []
    took: list[float] = []

    async def one(due: float) -> None:
        connection = free.pop() if free else Connection(port)
        status = await connection.ask(GOOD)
        took.append((time.perf_counter() - due) * 1000)
        free.append(connection)
        if status != 200:
            raise RuntimeError(f"a request was answered with {status}")

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for n in range(int(rate * seconds)):
            due = begin + n / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(due))
    return took


# -- what is measured --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_gateway(stack: DevStack, folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    """A gateway behind keys, and something that answers: its process and port."""
    keys = folder / "keys.json"
    add_key(keys, KeyEntry(name="load", hash=hash_of(KEY), tokens_per_minute=10**12, in_flight=10**6))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
        "EMBEDQ_GATEWAY_PORT": "0",
        "EMBEDQ_GATEWAY_KEYS_FILE": str(keys),
    }
    log = folder / "gateway.log"
    command = "from embedq_gateway.command import gateway; gateway()"
    with (
        log.open("wb") as stdout,
        subprocess.Popen([sys.executable, "-c", command], env=environ, stdout=stdout) as gateway,
        subprocess.Popen([sys.executable, "-m", "tests.helpers.responder", stack.kafka_servers]) as responder,
    ):
        try:
            yield psutil.Process(gateway.pid), asyncio.run(_ready(log))
        finally:
            gateway.terminate()
            responder.kill()


async def _ready(log: Path) -> int:
    while True:
        await asyncio.sleep(0.2)
        said = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        for event in said:
            if event["event"] == "listening":
                with contextlib.suppress(ConnectionError):
                    if await Connection(int(event["port"])).ask(GOOD) == 200:
                        return int(event["port"])


def measure_crowd(gateway: psutil.Process, port: int, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[float]] = {"alone": [], "in the crowd": []}
    seconds = {"alone": 0.0, "in the crowd": 0.0}
    _loaded(port, options.rate, 5)
    for n in range(2 * options.rounds):
        kind = ("alone", "in the crowd")[n % 2]
        with _crowd(port, options) if n % 2 else contextlib.nullcontext():
            before = gateway.cpu_times()
            took = _loaded(port, options.rate, options.seconds)
            found[kind] += took
            after = gateway.cpu_times()
            seconds[kind] += after.user + after.system - before.user - before.system
        shown = ", ".join(f"p{p} {np.percentile(took, p):.1f}" for p in (50, 95, 99))
        print(f"round {n + 1}, {kind}: {shown} ms", flush=True)
    figures = {
        kind: {
            "requests": len(took),
            **{f"p{p}_ms": round(float(np.percentile(took, p)), 2) for p in (50, 95, 99)},
            "gateway_cpu_seconds_a_second": round(seconds[kind] / options.rounds / options.seconds, 3),
        }
        for kind, took in found.items()
    }
    return {
        "idle": options.idle,
        "slow": options.slow,
        "requests_a_second": options.rate,
        **figures,
        "p99_ratio": round(figures["in the crowd"]["p99_ms"] / figures["alone"]["p99_ms"], 3),
    }


@contextlib.contextmanager
def _crowd(port: int, options: argparse.Namespace) -> Iterator[None]:
    command = [*_AGAIN, "as-crowd", str(port), "--idle", str(options.idle), "--slow", str(options.slow)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline().strip() != "there":
                raise RuntimeError("the crowd did not come")
            yield
        finally:
            process.kill()


def _loaded(port: int, rate: float, seconds: float) -> list[float]:
    command = [*_AGAIN, "as-load", str(port), "--rate", str(rate), "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=seconds + 120)
    found: list[float] = json.loads(done.stdout)
    return found


_AGAIN = [sys.executable, "-m", "benchmarks.gateway_peers"]


async def measure_memory(gateway: psutil.Process, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """One request in twenty is broken, and one in a hundred given up by its client."""
    statuses: dict[int, int] = {}
    left = options.requests
    done = 0
    samples: list[tuple[int, float]] = []

    async def client() -> None:
        nonlocal left, done
        connection = Connection(port)
        while left > 0:
            left -= 1
            done += 1
            if left % 100 == 7:
                connection.give_up(GOOD)
                continue
            status = await connection.ask(BROKEN if left % 20 == 3 else GOOD)
            statuses[status] = statuses.get(status, 0) + 1

    async def sampling() -> AsyncIterator[None]:
        while left > 0:
            if done >= len(samples) * options.requests / SAMPLES:
                samples.append((done, round(gateway.memory_info().rss / 2**20, 1)))
                print(f"{done:>8,} requests  {samples[-1][1]:.1f} MiB", flush=True)
            await asyncio.sleep(0.2)
            yield

    began = time.perf_counter()
    clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
    async for _ in sampling():
        pass
    await asyncio.gather(*clients)
    await asyncio.sleep(2)
    samples.append((done, round(gateway.memory_info().rss / 2**20, 1)))
    warm = [sample for sample in samples if sample[0] >= min(WARM, options.requests / 4)]
    slope = np.polyfit([count for count, _ in warm], [mib for _, mib in warm], 1)[0]
    return {
        "requests": done,
        "at_once": AT_ONCE,
        "requests_a_second": round(done / (time.perf_counter() - began)),
        "statuses": statuses,
        "mib_when_warm": warm[0][1],
        "mib_at_the_end": warm[-1][1],
        "mib_for_each_100000_requests": round(float(slope) * 100_000, 2),
        "samples": samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["crowd", "memory", "as-crowd", "as-load"])
    parser.add_argument("port", nargs="?", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--idle", type=int, default=IDLE)
    parser.add_argument("--slow", type=int, default=SLOW)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seconds", type=float, default=ROUND_S)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    options = parser.parse_args()
    if options.what == "as-crowd":
        asyncio.run(crowd(options.port, options.idle, options.slow))
        return 0
    if options.what == "as-load":
        print(json.dumps(asyncio.run(load(options.port, options.rate, options.seconds))))
        return 0
    with DevStack() as stack, tempfile.TemporaryDirectory() as folder:
        asyncio.run(create_topics(stack.kafka_servers))
        with a_gateway(stack, Path(folder)) as (gateway, port):
            if options.what == "crowd":
                found = measure_crowd(gateway, port, options)
            else:
                found = asyncio.run(measure_memory(gateway, port, options))
    for name, value in found.items():
        if name != "samples":
            print(f"{name.replace('_', ' '):<32}  {value}")
    write(f"gateway_peers-{options.what}", found, "embedq", "uvicorn", "httptools", "uvloop", "starlette")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
