"""The gateway beside other HTTP servers of embeddings, on one machine: `python -m benchmarks.gateway`.

    python -m benchmarks.gateway --infinity VENV --fastapi VENV --tei BINARY --onnx MODEL.onnx

Every server gets the same requests over the same client, 64 in flight, each in turn in every round: one short text each, and 32
texts each whose lengths nobody chose. infinity and sentence-transformers behind FastAPI run from virtual environments of their own,
text-embeddings-inference from its binary (`--onnx` for one with ONNX Runtime); what is not given is left out. The gateway comes with
Kafka and a replica, without Redis. Then one request at a time to each of them and to the SDK, in turns; and last, with Redis, requests
whose texts are cached. Vectors are compared before anything is timed. All share the cores with the client.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import http_servers
from benchmarks.http_load import Connection, load
from benchmarks.http_servers import OURS, Server, processor_ms, processor_seconds, version_of, versions
from benchmarks.machine import write
from benchmarks.pipeline import minilm
from benchmarks.texts import any_length, short
from embedq_sdk import EmbedClient
from embedq_sdk.dev import DevStack

AT_ONCE = 64
LEAST_COSINE = 0.9999
SDK = "embedq SDK"
ONE, MANY = "one short text a request", "32 texts of any length a request"
UNCACHED = "uncached"


def requests_of(case: str, server: Server, count: int, salt: str) -> list[bytes]:
    """`count` requests; another `salt` has other texts, so that nothing is remembered."""
    if case == ONE:
        return [server.request(text) for text in short(count, salt)]
    texts = any_length(32 * count, salt)
    return [server.request(texts[n : n + 32]) for n in range(0, len(texts), 32)]


async def throughput(servers: Sequence[Server], options: argparse.Namespace) -> dict[str, Any]:
    """Texts a second of each server, in each case; the first round warms up and does not count."""
    found: dict[str, dict[str, dict[str, list[Any]]]] = {ONE: {}, MANY: {}}
    counts = {ONE: options.single_requests, MANY: options.large_requests}
    for number in range(options.rounds + 1):
        for case, count in counts.items():
            of_a_request = 1 if case == ONE else 32
            for server in servers if number % 2 else reversed(servers):
                some = count if number else count // 8
                requests = requests_of(case, server, some, f"r{number}.")
                before = processor_seconds()
                done = await load(
                    server.port, requests, at_once=AT_ONCE, for_seconds=options.seconds if number else 2.0
                )
                after = processor_seconds()
                if not number:
                    continue
                texts = done.requests * of_a_request
                its = found[case].setdefault(server.name, {})
                its.setdefault("texts_per_s", []).append(round(texts / done.seconds, 1))
                its.setdefault("p50_ms", []).append(_percentile(done.milliseconds, 50))
                its.setdefault("p99_ms", []).append(_percentile(done.milliseconds, 99))
                its.setdefault("processor_ms_a_text", []).append(processor_ms(before, after, texts))
                print(
                    f"round {number}, {case}, {server.name}: {texts / done.seconds:,.0f} texts/s", flush=True
                )
    return {case: compared(its) for case, its in found.items()}


def compared(its: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Medians of the rounds, and ours over the best of the others in each round."""
    figures: dict[str, Any] = {
        name: {
            "texts_per_s": statistics.median(values["texts_per_s"]),
            "p50_ms": statistics.median(values["p50_ms"]),
            "p99_ms": statistics.median(values["p99_ms"]),
            "processor_ms_a_text": _median_of_each(values["processor_ms_a_text"]),
            "rounds": values["texts_per_s"],
        }
        for name, values in its.items()
    }
    others = [values["texts_per_s"] for name, values in its.items() if name != OURS]
    if others:
        best = [max(each) for each in zip(*others, strict=True)]
        ratios = [round(ours / other, 3) for ours, other in zip(its[OURS]["texts_per_s"], best, strict=True)]
        figures["over_the_best_other"] = {"median": statistics.median(ratios), "rounds": ratios}
    return figures


_A_TURN: Final = 20
"""Requests that count, one after the other, before it is another way's turn."""
_FIRST: Final = 5


async def alone(servers: Sequence[Server], client: EmbedClient, count: int) -> dict[str, Any]:
    """Milliseconds of one request with nothing else under way, some to each in turn. The first ones of a turn do not count: threads of
    the way before still spin, and the caches are full of its weights."""
    connections = {server.name: (server, Connection(server.port)) for server in servers}

    def asking(server: Server, connection: Connection) -> Callable[[str], Awaitable[Any]]:
        async def ask(text: str) -> None:
            if await connection.ask(server.request(text)) != 200:
                raise RuntimeError(f"{server.name}: {connection.body[:500]!r}")

        return ask

    ways: dict[str, Callable[[str], Awaitable[Any]]] = {
        SDK: client.embed,
        **{name: asking(server, connection) for name, (server, connection) in connections.items()},
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + math.ceil(count / _A_TURN)):
        for name, ask in ways.items():
            for number, text in enumerate(short(_FIRST + _A_TURN, f"alone{turn}{len(name)}.")):
                began = time.perf_counter()
                await ask(text)
                if turn and number >= _FIRST:
                    took[name].append((time.perf_counter() - began) * 1000)
                # Idle again: offsets are committed, and servers that keep an eye on the clock rest.
                await asyncio.sleep(0.01)
    for _, connection in connections.values():
        connection.close()
    figures: dict[str, Any] = {
        name: {f"p{share}_ms": _percentile(ms, share) for share in (50, 90)} for name, ms in took.items()
    }
    figures["http_adds_p50_ms"] = round(figures[OURS]["p50_ms"] - figures[SDK]["p50_ms"], 2)
    return figures


async def cached(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Requests a second whose texts are in the cache, vectors as openai's client asks for them."""
    texts = short(options.cached_texts, "cached.")
    requests = [server.request(text, encoding_format="base64") for text in texts]
    await load(server.port, requests, at_once=AT_ONCE)
    rates, p50, p99, spent = [], [], [], []
    for _ in range(options.rounds):
        some = (requests * (options.cached_requests // len(requests) + 1))[: options.cached_requests]
        before = processor_seconds()
        done = await load(server.port, some, at_once=AT_ONCE)
        spent.append(processor_ms(before, processor_seconds(), done.requests))
        rates.append(round(done.requests / done.seconds, 1))
        p50.append(_percentile(done.milliseconds, 50))
        p99.append(_percentile(done.milliseconds, 99))
    return {
        "requests_per_s": statistics.median(rates),
        "p50_ms": statistics.median(p50),
        "p99_ms": statistics.median(p99),
        "processor_ms_a_request": _median_of_each(spent),
        "rounds": rates,
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run."""
    model = options.model or minilm()
    results: dict[str, Any] = {"model": model.parent.name, "in_flight": AT_ONCE, "rounds": options.rounds}
    with DevStack() as stack, tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results["kafka"] = stack.kafka_description
        if options.only != "cached":
            async with AsyncExitStack() as opened:
                servers = await _started(opened, stack, model, scratch, options)
                await _same_vectors(servers)
                if options.only != "alone":
                    results["throughput"] = await throughput(servers, options)
                if options.only != "throughput":
                    client = EmbedClient(stack.kafka_servers, topic_prefix=UNCACHED)
                    await opened.enter_async_context(client)
                    results["alone"] = await alone(servers, client, options.alone_requests)
        if options.only in (None, "cached"):
            async with http_servers.gateway(stack, model, scratch, prefix="cached", cached=True) as server:
                results["cached"] = await cached(server, options)
    return results


async def _started(
    opened: AsyncExitStack, stack: DevStack, model: Path, scratch: Path, options: argparse.Namespace
) -> list[Server]:
    """Ours first; they start side by side."""
    ways = [http_servers.gateway(stack, model, scratch, prefix=UNCACHED, cached=False)]
    if options.tei is not None:
        ways.append(http_servers.text_embeddings_inference(options.tei, options.onnx, model, scratch))
    if options.infinity is not None:
        ways.append(http_servers.infinity(options.infinity, model, scratch))
    if options.fastapi is not None:
        ways.append(http_servers.fastapi(options.fastapi, model, scratch))
    async with asyncio.TaskGroup() as starting:
        started = [starting.create_task(opened.enter_async_context(way)) for way in ways]
    return [task.result() for task in started]


async def _same_vectors(servers: Sequence[Server]) -> None:
    texts = any_length(32, "compared.")
    ours, *others = [np.array(await server.vectors(texts)) for server in servers]
    for server, vectors in zip(servers[1:], others, strict=True):
        if (least := np.sum(ours * vectors, axis=1).min()) < LEAST_COSINE:
            raise SystemExit(f"{server.name}: cosine {least:.4f} to {OURS}: there is nothing to time")


def _percentile(milliseconds: Sequence[float], share: int) -> float:
    return round(float(np.percentile(milliseconds, share)), 2)


def _median_of_each(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    parts = dict.fromkeys(part for each in rounds for part in each)
    return {part: round(statistics.median(each.get(part, 0.0) for each in rounds), 3) for part in parts}


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    for case, its in results.get("throughput", {}).items():
        table = Table(title=f"{case}, {AT_ONCE} in flight: medians of {results['rounds']} rounds")
        for column in ("server", "texts/s", "p50 ms", "p99 ms", "processor ms a text, by part"):
            table.add_column(column, justify="right" if column[-1] == "s" and column != "server" else "left")
        for name, figures in its.items():
            if name != "over_the_best_other":
                parts = ", ".join(f"{part} {ms:.2f}" for part, ms in figures["processor_ms_a_text"].items())
                values = (f"{figures[key]:,.0f}" for key in ("texts_per_s", "p50_ms", "p99_ms"))
                table.add_row(name, *values, parts)
        console.print(table)
        if "over_the_best_other" in its:
            ratios = its["over_the_best_other"]
            print(f"{OURS} over the best other in the same round: {ratios['median']} {ratios['rounds']}")
    if "alone" in results:
        table = Table(title="one short text, nothing else under way")
        for column in ("way", "p50 ms", "p90 ms"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name, figures in results["alone"].items():
            if isinstance(figures, dict):
                table.add_row(name, f"{figures['p50_ms']:.1f}", f"{figures['p90_ms']:.1f}")
        console.print(table)
        print(f"HTTP adds to the SDK's call (p50): {results['alone']['http_adds_p50_ms']} ms")
    if "cached" in results:
        found = results["cached"]
        print(
            f"cached: {found['requests_per_s']:,.0f} requests/s {found['rounds']}, p50 {found['p50_ms']} ms, "
            f"p99 {found['p99_ms']} ms; processor ms a request: {found['processor_ms_a_request']}"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument(
        "--infinity", type=Path, default=None, help="a virtual environment with infinity-emb[torch,server]"
    )
    parser.add_argument(
        "--fastapi", type=Path, default=None, help="one with fastapi, uvicorn and sentence-transformers"
    )
    parser.add_argument("--tei", type=Path, default=None, help="the binary of text-embeddings-inference")
    parser.add_argument(
        "--onnx", type=Path, default=None, help="the model's graph, for a --tei that needs one"
    )
    parser.add_argument("--only", choices=["throughput", "alone", "cached"], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="after which a round sends nothing more")
    parser.add_argument("--single-requests", type=int, default=1536, help="of one text, at most, a round")
    parser.add_argument("--large-requests", type=int, default=80, help="of 32 texts, at most, a round")
    parser.add_argument("--alone-requests", type=int, default=60, help="to each way")
    parser.add_argument("--cached-texts", type=int, default=512)
    parser.add_argument("--cached-requests", type=int, default=6000, help="a round")
    options = parser.parse_args()
    results = uvloop.run(run(options))
    common = ("fastapi", "uvicorn", "torch", "transformers", "sentence-transformers")
    results["packages_of_others"] = {
        "infinity": versions(options.infinity, "infinity-emb", *common),
        "FastAPI": versions(options.fastapi, *common),
        "text-embeddings-inference": version_of(options.tei),
    }
    show(results)
    packages = ("embedq", "torch", "aiokafka", "uvicorn", "httptools", "uvloop", "msgspec")
    print(f"written to {write('gateway', results, *packages)}")


if __name__ == "__main__":
    main()
