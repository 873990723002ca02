"""embedq beside its peers on a CPU: texts a second and idle latency, each way in turn in every round: `python -m benchmarks.peers_cpu`.

Loads: short texts of one length, long ones of one length, and mixed ones; one text a request and 32, eight requests at once.
embedq runs through Kafka, and its encoder alone, each in float32 and in bf16. sentence-transformers runs with each backend that is installed (torch, ONNX,
OpenVINO, and that in float32, too), infinity where it is installed, with the pooling that the model means, here or in the
environment of `--peers`, which need not have embedq; text-embeddings-inference where its binary is given. Each way is a process of
its own, and its first vectors are compared with sentence-transformers' before anything is timed: the largest difference of a
component is in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import http_servers
from benchmarks.encoder_cpu import mixed
from benchmarks.machine import write
from benchmarks.peer_process import NEEDS, REFERENCE
from benchmarks.pipeline import minilm, replica
from benchmarks.texts import sentences
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack

Vectors = npt.NDArray[np.float32]
Embed = Callable[[list[str]], Awaitable[Vectors]]
"""The vectors of one request."""

ROOT: Final = Path(__file__).parents[1]
LEAST_COSINE: Final = 0.999
DIFFERENCE: Final = "largest difference of a component"
AT_ONCE: Final = 8
"""Requests under way at once, but for the idle latency."""
PRECISIONS: Final = {"embedq through Kafka": "none", "embedq through Kafka, bf16": "bf16"}
"""Each way through Kafka, and its `quantization`."""
_END_S: Final = 5.0

# -- the ways -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def process(python: str, way: str, model: Path) -> AsyncIterator[Embed]:
    """`peer_process` in this interpreter, which takes one request at a time."""
    child = await asyncio.create_subprocess_exec(
        *(python, "-W", "ignore", "-m", "benchmarks.peer_process", way, str(model)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    turn = asyncio.Lock()

    async def embed(texts: list[str]) -> Vectors:
        assert child.stdin is not None
        assert child.stdout is not None
        async with turn:
            child.stdin.write(json.dumps(texts).encode() + b"\n")
            await child.stdin.drain()
            return np.array(json.loads(await child.stdout.readline()), dtype=np.float32)

    try:
        yield embed
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await child.wait()
        except TimeoutError:  # infinity's threads go on without end
            child.kill()
            await child.wait()


@asynccontextmanager
async def through_kafka(model: Path) -> AsyncIterator[dict[str, Embed]]:
    """A replica and a client for each of `PRECISIONS`, without a cache that would answer the second round."""
    async with AsyncExitStack() as opened:
        stack = opened.enter_context(DevStack())
        scratch = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        ways = {}
        for way, quantization in PRECISIONS.items():
            await create_topics(stack.kafka_servers, prefix=quantization, partitions=4, reply_partitions=4)
            log = scratch / quantization
            served = replica(
                stack, model, log, quantization, cached=False, device="cpu", quantization=quantization
            )
            await opened.enter_async_context(served)
            client = await opened.enter_async_context(
                EmbedClient(stack.kafka_servers, topic_prefix=quantization)
            )
            ways[way] = _embed_with(client)
        yield ways


def _embed_with(client: EmbedClient) -> Embed:
    async def embed(texts: list[str]) -> Vectors:
        return np.asarray(await client.embed(texts, timeout=300), dtype=np.float32)

    return embed


@asynccontextmanager
async def text_embeddings_inference(
    binary: Path, onnx: Path | None, model: Path, scratch: Path
) -> AsyncIterator[Embed]:
    """Its binary, with the model's graph for one that was built with ONNX Runtime."""

    def post(port: int, texts: list[str]) -> Vectors:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/embed",
            json.dumps({"inputs": texts, "truncate": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            return np.array(json.loads(answer.read()), dtype=np.float32)

    async with http_servers.text_embeddings_inference(binary, onnx, model, scratch) as server:
        yield lambda texts: asyncio.to_thread(post, server.port, texts)


# -- the loads ----------------------------------------------------------------------------------------------------------


def loads(count: int) -> dict[str, list[str]]:
    """Texts of each load."""
    lines = sentences()
    short = [f"{lines[n % len(lines)][:50]:.<50}" for n in range(count)]
    long = [" ".join((lines * 2)[n % len(lines) : n % len(lines) + 8])[:700] for n in range(count // 4)]
    return {"short": short, "mixed": (mixed(lines) * count)[: count // 2], "long": long}


async def seconds(embed: Embed, texts: Sequence[str], a_request: int) -> float:
    """For all of them, `AT_ONCE` requests at a time."""
    requests = iter([[*texts[n : n + a_request]] for n in range(0, len(texts), a_request)])

    async def caller() -> None:
        for request in requests:
            await embed(request)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def idle_ms(embed: Embed, texts: Sequence[str]) -> float:
    """The median of single texts, one after the other."""
    found = []
    for text in texts:
        began = time.perf_counter()
        await embed([text])
        found.append((time.perf_counter() - began) * 1000)
    return statistics.median(found)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run."""
    model, tei = options.model or minilm(), options.tei
    cases = [(load, a_request) for load in ("short", "mixed", "long") for a_request in (1, 32)]
    found: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as opened:
        ways: dict[str, Embed] = {}
        for way, package in NEEDS.items():
            pythons = (each for each in (sys.executable, options.peers) if each and _has(each, package))
            if (python := next(pythons, None)) is not None:
                ways[way] = await opened.enter_async_context(process(python, way, model))
        if tei is not None:
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            ways["text-embeddings-inference"] = await opened.enter_async_context(
                text_embeddings_inference(tei, options.onnx, model, scratch)
            )
        ways |= await opened.enter_async_context(through_kafka(model))
        of_load = loads(options.texts)
        differences = await _compare(ways, of_load["mixed"][:8])
        for number in range(options.rounds + 1):
            for load, a_request in cases:
                for way, embed in ways.items():
                    some = of_load[load] if number else of_load[load][:32]  # the first round warms up
                    took = await seconds(embed, some, a_request)
                    if number:
                        name = f"{load}, {a_request} a request: texts/s"
                        found.setdefault(name, {}).setdefault(way, []).append(len(some) / took)
            for way, embed in ways.items():
                if number:
                    took = await idle_ms(embed, of_load["short"][:30])
                    found.setdefault("one short text, idle: ms", {}).setdefault(way, []).append(took)
    timed = {
        case: {
            way: {"median": round(statistics.median(each), 2), "rounds": each} for way, each in its.items()
        }
        for case, its in found.items()
    }
    return {**timed, DIFFERENCE: differences}


async def _compare(ways: dict[str, Embed], texts: list[str]) -> dict[str, float]:
    """The largest difference of a component from the reference's, of each way."""
    expected = await ways[REFERENCE](texts)
    differences = {}
    for way, embed in ways.items():
        vectors = await embed(texts)
        cosines = np.sum(vectors * expected, axis=1)
        if cosines.min() < LEAST_COSINE:
            raise SystemExit(f"{way}: cosine {cosines.min():.4f} to {REFERENCE}: there is nothing to time")
        differences[way] = float(np.abs(vectors - expected).max())
    return differences


def _has(python: str, package: str) -> bool:
    """Whether this interpreter can import it, which is tried: half of an installation is none."""
    tried = [python, "-W", "ignore", "-c", f"import {package}"]
    return subprocess.run(tried, check=False, stderr=subprocess.DEVNULL).returncode == 0


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    ways = list(next(iter(results.values())))
    table = Table(title="medians of the rounds")
    for column in ("what", *ways):
        table.add_column(column, justify="left" if column == "what" else "right")
    for case, its in results.items():
        cells = [f"{its[way]:.0e}" if case == DIFFERENCE else f"{its[way]['median']:,.1f}" for way in ways]
        table.add_row(case, *cells)
    Console().print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument(
        "--peers", default=None, help="the interpreter of an environment with more of the peers"
    )
    parser.add_argument("--tei", type=Path, default=None, help="the binary of text-embeddings-inference")
    parser.add_argument(
        "--onnx", type=Path, default=None, help="the model's graph, for a --tei that needs one"
    )
    parser.add_argument("--texts", type=int, default=640, help="short texts a round; half as many mixed ones")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    show(results)
    packages = (
        "embedq",
        "torch",
        "sentence-transformers",
        "onnxruntime",
        "openvino",
        "infinity-emb",
        "aiokafka",
    )
    model = arguments.model or minilm()
    print(f"written to {write('peers_cpu', {'model': model.parent.name, **results}, *packages)}")


if __name__ == "__main__":
    main()
