"""What a reload costs those who wait, under full load: the pause of the device, latency around it, time to ready, memory.

    python -m benchmarks.reload_pause                                   # a very small Qwen3 on a CPU
    python -m benchmarks.reload_pause --shape 4B --kafka /tmp/kafka     # on a GPU

The real service, on a real Kafka, has more documents than it can do, and somebody asks for a short text twenty times a second.
Its model changes back and forth between two directories of one shape with other weights: reloads beside the old model, then in
its place; the last ones of each find their files on the disk and not in memory. When micro-batches ran, and for which model, the
service's own log says (`EMBEDQ_LOG_LEVEL=debug`). Each sampled vector is compared with that of the model that its result names.
What reading the files and copying to the device takes alone is measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.corpora import LENGTHS
from benchmarks.machine import GPU_PACKAGES, write
from benchmarks.qwen3_shapes import SHAPES, make
from benchmarks.reload_figures import Call, Spans, at, figures, latency, micro_batches, spread, steps
from benchmarks.sized_texts import sized_texts
from benchmarks.startup import reading
from benchmarks.whole_path import Service, kafka_of
from embedq_consumer.engine import Quantization, Text, Tokens, load_encoder
from embedq_consumer.engine.loading import compile_cache
from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_shared.codec import decode_result, encode_record
from embedq_shared.messages import Control, Policy, Result
from embedq_shared.topics import MODEL_VERSION, Topics
from embedq_shared.vectors import cut_and_normalize, dequantize

Vectors = npt.NDArray[np.float32]

NAMES: Final = ("one", "two")
PARTITIONS: Final = 6
DIMENSIONS: Final = 128
"""Of the vectors that are compared: as telling as whole ones, and ten thousand of them take 10 MB."""
SAMPLED: Final = 60
"""Documents whose every result is compared."""
AROUND_S: Final = 10.0
"""The span of latencies around a swap, and before a command."""
LEAST_COSINE: Final = 0.98
"""To the vector of the model that a result names: other neighbors in a micro-batch, other roundings."""
TAIL_S: Final = 75.0
"""What is kept for the end: the last answers, the service's stop, and both models' vectors."""


# -- the models, and what reading them takes alone ----------------------------------------------------------------------


def checkpoint(folder: Path, name: str, shape: str, seed: int) -> Path:
    """One of the two models, whole or not there."""
    path = folder / name
    if not path.exists():
        part = folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        make(part, shape, seed=seed).rename(path)
    return path


def bus() -> dict[str, Any]:
    """The GPU, and gigabytes a second from pinned and from ordinary memory to it; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for kind in ("pinned", "ordinary"):
        here = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=kind == "pinned")
        there.copy_(here)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(5):
            there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        found[f"{kind}_gb_per_s"] = round(5 * here.numel() / 1e9 / (time.perf_counter() - begin), 1)
    return found


def alone(path: str, quantization: Quantization, texts: Sequence[str]) -> tuple[str, Vectors]:
    """A model's version, and its unit vectors of these texts, cut to `DIMENSIONS`, by an engine that was never reloaded."""
    compile_cache.enable(compile_cache.default_directory(os.environ), os.environ)
    encoder = load_encoder(Path(path), quantization=quantization)
    tokens = [each for each in encoder.tokenize([Text(text) for text in texts]) if isinstance(each, Tokens)]
    assert len(tokens) == len(texts)
    rows = [
        cut_and_normalize(vector, DIMENSIONS)
        for begin in range(0, len(tokens), 64)
        for vector in encoder.submit(tokens[begin : begin + 64]).result()
    ]
    return encoder.model_version, np.stack(rows)


def apart(*calls: tuple[Any, ...]) -> list[Any]:
    """What these calls return, each in a process of its own, at once: this one holds nothing of the device."""
    with ProcessPoolExecutor(len(calls), mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(call, *given) for call, *given in calls]
        return [each.result() for each in running]


# -- the load, and what is seen of it -------------------------------------------------------------------------------------


class Log:
    """What the service has logged, read as it grows."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Everything so far."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        self.events += [json.loads(line) for line in lines if line.startswith(b"{")]
        return self.events


class Documents:
    """More documents than the service can do, by turns the same ones; and every one's answers."""

    def __init__(self, texts: Sequence[str], topic: str, ahead: int) -> None:
        self._texts = texts
        self._topic = topic
        self._ahead = ahead
        every = max(1, len(texts) // SAMPLED)
        self.sampled: Final = list(range(0, len(texts), every))
        self.sent = 0
        self.answers: dict[int, int] = {}
        """How often each job was answered."""
        self.failed: list[str] = []
        self.vectors: list[tuple[int, str, Vectors]] = []
        """Of sampled texts: which one, the version that the result names, and its vector."""

    def text_of(self, number: int) -> int:
        """Which text a job has."""
        return number % len(self._texts)

    async def feed(self, producer: AIOKafkaProducer) -> None:
        """Keep so many jobs queued, until cancelled."""
        while True:
            while self.sent - len(self.answers) < self._ahead:
                job = {"id": str(self.sent), "input": self._texts[self.text_of(self.sent)]}
                await producer.send(
                    self._topic,
                    msgspec.msgpack.encode(job),
                    partition=self.sent % PARTITIONS,
                    headers=[
                        ("correlation-id", str(self.sent).encode()),
                        ("content-type", b"application/msgpack"),
                    ],
                )
                self.sent += 1
            await asyncio.sleep(0.05)

    async def read(self, consumer: AIOKafkaConsumer) -> None:
        """Take every answer, until cancelled."""
        sampled = set(self.sampled)
        while True:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    headers = dict(record.headers)
                    number = int(headers["correlation-id"])
                    self.answers[number] = self.answers.get(number, 0) + 1
                    if headers["embedq-status"] != b"ok":
                        self.failed.append(record.value[:300].decode(errors="replace"))
                    elif self.text_of(number) in sampled:
                        result = decode_result(record.value, "msgpack")
                        assert isinstance(result, Result)
                        assert headers[MODEL_VERSION] == result.model_version.encode()
                        vector = dequantize(result.data[0].embedding, "float32")
                        cut = cut_and_normalize(vector, DIMENSIONS)
                        self.vectors.append((self.text_of(number), result.model_version, cut))


class Trickle:
    """Somebody who asks for one short text at a time, so many times a second, whatever the answers take."""

    def __init__(self, texts: Iterator[str], every_s: float) -> None:
        self._texts = texts
        self._every_s = every_s
        self.calls: list[Call] = []
        self.texts: list[str] = []
        """Of each call."""
        self.vectors: list[Vectors] = []
        self.failed: list[str] = []

    async def run(self, client: EmbedClient) -> None:
        """Until cancelled; then for the answers that are still to come."""
        async with asyncio.TaskGroup() as calls:
            begin = time.monotonic()
            with suppress(asyncio.CancelledError):
                for number in count():
                    calls.create_task(self._call(client, next(self._texts)))
                    await asyncio.sleep(max(0.0, begin + (number + 1) * self._every_s - time.monotonic()))

    async def _call(self, client: EmbedClient, text: str) -> None:
        sent, begin = time.time(), time.monotonic()
        try:
            found = await client.embed_detailed(text, dimensions=DIMENSIONS, timeout=120)
        except Exception as error:  # noqa: BLE001  # counted, and shown at the end
            self.failed.append(f"{type(error).__name__}: {error}")
            return
        self.calls.append(Call(sent, time.monotonic() - begin, str(found.model_versions[0])))
        self.texts.append(text)
        self.vectors.append(found.vectors[0])


def short_texts() -> Iterator[str]:
    """Never one twice."""
    for number in count():
        yield f"the {number}th day"


async def read_statuses(consumer: AIOKafkaConsumer, found: list[dict[str, Any]]) -> None:
    """Note every status, until cancelled."""
    while True:
        for records in (await consumer.getmany(timeout_ms=100)).values():
            found += [json.loads(record.value) for record in records if record.value]


@asynccontextmanager
async def reader_of(servers: str, topic: str, partitions: int) -> AsyncIterator[AIOKafkaConsumer]:
    """A plain consumer of a whole topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, fetch_max_wait_ms=50)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, number) for number in range(partitions)])
        await consumer.seek_to_beginning()
        yield consumer
    finally:
        await consumer.stop()


async def until(true: Callable[[], object], service: Service, within_s: float, what: str) -> None:
    """Wait for something, as long as the service lives."""
    deadline = time.monotonic() + within_s
    while not true():
        service.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} within {within_s:g} s:\n{service.log.read_text()[-3000:]}")
        await asyncio.sleep(0.05)


# -- one run ----------------------------------------------------------------------------------------------------------------


class Run:
    """The service under load, and its reloads one after the other."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        folder: Path,
        service: Service,
        producer: AIOKafkaProducer,
        topics: Topics,
    ) -> None:
        self._arguments = arguments
        self._folder = folder
        self._service = service
        self._producer = producer
        self._topics = topics
        self._version = 0
        self.log = Log(service.log)
        self.statuses: list[dict[str, Any]] = []
        self.reloads: list[dict[str, Any]] = []
        self.last_s = 0.0
        """Seconds of the last reload, with what is waited for after it."""

    async def started(self, answers: Callable[[], int]) -> dict[str, Any]:
        """Wait until it has been busy for a while; how it started."""
        await until(lambda: answers() > 50, self._service, 300, "start")
        await asyncio.sleep(self._arguments.quiet)
        return {
            "load_s": self._last("model_loaded")["seconds"],
            "kernels": self._last("model_loaded")["kernels"],
            "budget": budget_of(self._last("batch_budget")),
        }

    async def reload(self, policy: Policy, *, cold: bool) -> None:
        """Change to the other model, and wait until nothing of it goes on any more."""
        begin = time.monotonic()
        self._version += 1
        path = NAMES[self._version % 2]
        if cold:
            forget(self._folder / path)
        command = Control(
            alias="default", version=self._version, path=path, command_id=uuid.uuid4().hex, policy=policy
        )
        sent = time.time()
        await self._producer.send_and_wait(self._topics.control, encode_record(command), key=b"default")

        def outcome() -> dict[str, Any] | None:
            said = (one for one in self.statuses if one["command_id"] == command.command_id)
            return next((one for one in said if one["state"] in ("READY", "FAILED")), None)

        await until(outcome, self._service, 300, "outcome of a reload")
        done = outcome()
        assert done is not None
        if done["state"] != "READY":
            raise SystemExit(f"reload {self._version}: {done['error']}")
        ready = done["at"] / 1000
        await asyncio.sleep(max(0.0, ready + max(0.5, self._arguments.quiet - 1) - time.time()))
        await until(lambda: self._memory_after(ready + 0.5), self._service, 30, "look at the memory")
        held = await asyncio.to_thread(self.held, ready + 0.5)
        await asyncio.sleep(max(0.0, ready + self._arguments.quiet - time.time()))
        swap = next(
            one["at"] / 1000
            for one in self.statuses
            if one["command_id"] == command.command_id and one["step"] == "swap"
        )
        loaded = [event for event in self.log.events if event["event"] == "model_loaded" and at(event) > sent]
        freed = [event for event in self.log.events if event["event"] == "model_freed" and at(event) > sent]
        budgets = [
            event for event in self.log.events if event["event"] == "batch_budget" and at(event) > sent
        ]
        self.reloads.append(
            {
                "policy": policy,
                "files_on_disk": cold,
                "model_version": done["model_version"],
                "spans": Spans(sent, swap, ready),
                "steps_s": steps(self.statuses, command.command_id, sent),
                "load_s": loaded[-1]["seconds"],
                "freed_s": {name: freed[-1][name] for name in ("seconds", "longest_step_s")},
                "budgets": [budget_of(event) for event in budgets],
                "memory": held,
            }
        )
        self.last_s = time.monotonic() - begin
        print(f"{policy} {self._version}: ready after {ready - sent:.1f} s", flush=True)

    def held(self, since: float) -> dict[str, float]:
        """Megabytes that the service holds: of the GPU, by itself and by nvidia-smi; of memory, by kind."""
        held = process_memory(self._service.process.pid)
        if (event := self._memory_after(since)) is not None and "reserved" in event:
            held |= {
                "gpu_allocated": (event["total"] - event["used"] + event["reserved"] - event["free"]) / 1e6,
                "gpu_reserved": event["reserved"] / 1e6,
                "gpu_used": event["used"] / 1e6,
                "gpu_peak": event["peak"] / 1e6,
                "nvidia_smi_used": nvidia_smi_used(),
            }
        return {name: round(megabytes, 2) for name, megabytes in held.items()}

    def _memory_after(self, when: float) -> dict[str, Any] | None:
        events = (one for one in reversed(self.log.read()) if one["event"] == "memory")
        last = next(events, None)
        return last if last is not None and at(last) > when else None

    def _last(self, name: str) -> dict[str, Any]:
        return next(event for event in reversed(self.log.read()) if event["event"] == name)


def budget_of(event: dict[str, Any]) -> dict[str, int | bool]:
    """A budget that was found by trial, or taken over."""
    return {
        "tokens": event["tokens"],
        "longest_text": event["longest_text"],
        "taken_over": event.get("taken_over", False),
    }


def forget(path: Path) -> None:
    """Have the system forget a model's files, as far as it does."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def process_memory(pid: int) -> dict[str, float]:
    """Megabytes of a process: pages with content of its own, and all that are its alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {
        name: int(size.split()[0]) * 1024 / 1e6 for name, _, size in (line.partition(":") for line in lines)
    }
    return {
        "anonymous": sizes["Anonymous"],
        "unique": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "resident": sizes["Rss"],
    }


def nvidia_smi_used() -> float:
    """Megabytes of the first GPU that anybody has, by nvidia-smi, which counts in 1,048,576."""
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return int(said.splitlines()[0]) * 1.048576


async def measure(
    servers: str, arguments: argparse.Namespace, folder: Path, texts: Sequence[str], log: Path
) -> tuple[dict[str, Any], Documents, Trickle]:
    """Everything under load: figures of each reload, and what was answered meanwhile."""
    prefix = f"r{uuid.uuid4().hex[:8]}"
    topics = Topics(prefix)
    await create_topics(servers, prefix=prefix, partitions=PARTITIONS, reply_partitions=1)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")} | {
        "EMBEDQ_KAFKA_SERVERS": servers,
        "EMBEDQ_TOPIC_PREFIX": prefix,
        "EMBEDQ_GROUP": prefix,
        "EMBEDQ_MODEL": str(folder / NAMES[0]),
        "EMBEDQ_HTTP_PORT": "0",
        "EMBEDQ_QUANTIZATION": arguments.quantization,
        "EMBEDQ_LOG_LEVEL": "debug",
        "PYTHONUNBUFFERED": "1",
        **dict(pair.split("=", 1) for pair in arguments.set),
    }
    service = Service(environ, log, None)
    documents = Documents(texts, topics.bulk if arguments.lane == "bulk" else topics.jobs, arguments.ahead)
    trickle = Trickle(short_texts(), 1 / arguments.calls_per_s)
    producer = AIOKafkaProducer(bootstrap_servers=servers, linger_ms=5, max_batch_size=900_000)
    await producer.start()
    await service.start()
    try:
        run = Run(arguments, folder, service, producer, topics)
        async with (
            reader_of(servers, topics.results, PARTITIONS) as results,
            reader_of(servers, topics.status, 1) as status,
            EmbedClient(servers, topic_prefix=prefix, connect_timeout=60) as client,
            asyncio.TaskGroup() as tasks,
        ):
            reading = [
                tasks.create_task(read_statuses(status, run.statuses)),
                tasks.create_task(documents.read(results)),
            ]
            feeding = tasks.create_task(documents.feed(producer))
            asking = tasks.create_task(trickle.run(client))
            found = await _reloads(run, documents, arguments)
            for task in (feeding, asking):
                task.cancel()
            await until(
                lambda: len(documents.answers) == documents.sent and asking.done(),
                service,
                120,
                "last answer",
            )
            for task in reading:
                task.cancel()
        found |= summary(run, trickle, arguments.quiet)
    finally:
        await producer.stop()
        if service.process.returncode is None:
            await service.stop()
    return found, documents, trickle


async def _reloads(run: Run, documents: Documents, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that there is time for."""
    found = {"start": await run.started(lambda: len(documents.answers))}
    beside, instead = arguments.reloads, arguments.in_place
    plan: list[tuple[Policy, bool]] = [
        *(("availability_preserving", number >= beside - arguments.cold) for number in range(beside)),
        *(("resource_preserving", number == instead - 1) for number in range(instead)),
    ]
    until_s = arguments.began + arguments.within - TAIL_S
    for place, (policy, cold) in enumerate(plan):
        later = arguments.in_place if policy == "availability_preserving" else 0
        if place and time.monotonic() + (1 + later) * run.last_s > until_s:
            if policy == "resource_preserving":
                break
            continue
        await run.reload(policy, cold=cold)
    return found


# -- figures ------------------------------------------------------------------------------------------------------------------


def summary(run: Run, trickle: Trickle, quiet_s: float) -> dict[str, Any]:
    """A row for each reload, and what they have in common."""
    batches = micro_batches(run.log.read())
    rows: list[dict[str, Any]] = []
    for reload in run.reloads:
        spans = reload.pop("spans")
        row = reload | figures(batches, spans, quiet_s)
        swapped = row.pop("swapped_at")
        row["latency"] = {
            "before": latency(trickle.calls, spans.command - min(quiet_s, AROUND_S), spans.command),
            "around": latency(trickle.calls, swapped - AROUND_S / 2, swapped + AROUND_S / 2),
            "whole": latency(trickle.calls, spans.command, spans.ready),
        }
        rows.append(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        )
    found: dict[str, Any] = {"reloads": rows}
    for policy in ("availability_preserving", "resource_preserving"):
        of = [row for row in rows if row["policy"] == policy]
        if of:
            found[policy] = {
                "reloads": len(of),
                **{name: spread([row[name] for row in of]) for name in COMMON},
                "within_50_ms": sum(row["beyond_a_micro_batch_s"] <= 0.05 for row in of),
                "ready_s": spread([row["steps_s"]["ready"] for row in of]),
                **{
                    f"p99_{span}_ms": spread([row["latency"][span].get("p99_ms", 0.0) for row in of])
                    for span in ("before", "around", "whole")
                },
            }
    found["memory"] = {
        kind: {
            "after_the_first": first,
            "after_each_of": [row["memory"][kind] for row in rows],
            "most_over_the_first": round(max(row["memory"][kind] for row in rows) / first, 4),
        }
        for kind, first in rows[0]["memory"].items()
    }
    return found


COMMON: Final = (
    "pause_s",
    "micro_batch_s",
    "beyond_a_micro_batch_s",
    "longest_without_an_answer_s",
    "trial_s",
    "tokens_per_s_before",
    "tokens_per_s_during",
)


def compare(
    documents: Documents, trickle: Trickle, folder: Path, quantization: Quantization, texts: Sequence[str]
) -> dict[str, Any]:
    """Each sampled vector against the model that its result names, and against the other one."""
    chosen = [texts[number] for number in documents.sampled]
    whole = [*chosen, *trickle.texts]
    places = {number: place for place, number in enumerate(documents.sampled)}
    expected: dict[str, Vectors] = dict(
        apart(*((alone, str(folder / name), quantization, whole) for name in NAMES))
    )
    named: list[float] = []
    other: list[float] = []
    found = [(places[number], version, vector) for number, version, vector in documents.vectors]
    found += [
        (len(chosen) + place, call.version, vector)
        for place, (call, vector) in enumerate(zip(trickle.calls, trickle.vectors, strict=True))
    ]
    for place, version, vector in found:
        named.append(float(expected[version][place] @ vector))
        other += [float(rows[place] @ vector) for its, rows in expected.items() if its != version]
    return {
        "compared": len(found),
        "untrue": sum(cosine < LEAST_COSINE for cosine in named),
        "least_cosine_to_the_model_named": round(min(named), 5),
        "most_to_the_other": round(max(other), 5),
        "versions": len({version for _, version, _ in found}),
    }


def show(results: dict[str, Any]) -> None:
    """A line for each reload, and one for each figure."""
    print(
        f"\n{'policy':<14}{'ready s':>8}{'load s':>8}{'pause ms':>10}{'micro-b. ms':>12}{'no answer ms':>13}{'trial s':>8}"
        f"{'p99 before':>11}{'around':>8}{'whole':>8}{'tok/s':>9}{'during':>9}{'anon MB':>9}{'GPU MB':>9}{'budget':>8}"
    )
    for row in results["reloads"]:
        wait, memory = row["latency"], row["memory"]
        print(
            f"{row['policy'].partition('_')[0]:<14}{row['steps_s']['ready']:>8.1f}{row['steps_s'].get('load', 0.0):>8.1f}"
            f"{1000 * row['pause_s']:>10.1f}{1000 * row['micro_batch_s']:>12.1f}"
            f"{1000 * row['longest_without_an_answer_s']:>13.1f}{row['trial_s']:>8.2f}"
            + "".join(f"{wait[span].get('p99_ms', 0.0):>{width}.0f}" for span, width in SPANS)
            + f"{row['tokens_per_s_before']:>9.0f}{row['tokens_per_s_during']:>9.0f}{memory['anonymous']:>9.1f}"
            f"{memory.get('gpu_allocated', 0.0):>9.1f}{row['budgets'][-1]['tokens']:>8}"
            + (" from the disk" if row["files_on_disk"] else "")
        )
    for name, value in results.items():
        if name != "reloads":
            print(f"{name}: {json.dumps(value)}")


SPANS: Final = (("before", 11), ("around", 8), ("whole", 8))


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="least")
    parser.add_argument(
        "--models", type=Path, help="where both models are or go; the temporary directory otherwise"
    )
    parser.add_argument("--only-models", action="store_true", help="make them, and end")
    parser.add_argument("--kafka", type=Path, help="a directory with jre/ and jars/; else the local stack")
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none")
    parser.add_argument("--lane", choices=["bulk", "interactive"], default="bulk", help="of the documents")
    parser.add_argument("--longest", type=int, default=0, help="cut longer documents, in tokens")
    parser.add_argument("--ahead", type=int, default=3000, help="documents that are queued and not answered")
    parser.add_argument("--calls-per-s", type=float, default=20.0, help="of the one who asks for short texts")
    parser.add_argument("--reloads", type=int, default=20, help="beside the old model")
    parser.add_argument("--in-place", type=int, default=3, help="more, in the old model's place")
    parser.add_argument("--cold", type=int, default=2, help="of those beside, the last so many read the disk")
    parser.add_argument("--quiet", type=float, default=AROUND_S, help="seconds between two reloads")
    parser.add_argument(
        "--within", type=float, default=3600.0, help="seconds for everything; fewer reloads if need be"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="EMBEDQ_NAME=VALUE")
    parser.add_argument("--name", default="reload_pause")
    arguments = parser.parse_args()
    arguments.began = time.monotonic()
    folder = arguments.models or Path(tempfile.gettempdir()) / f"embedq-reload-{arguments.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    apart(*((checkpoint, folder, name, arguments.shape, seed) for seed, name in enumerate(NAMES)))
    if arguments.only_models:
        return
    results: dict[str, Any] = {
        "shape": arguments.shape,
        "quantization": arguments.quantization,
        "lane_of_the_documents": arguments.lane,
        "reading": reading(folder / NAMES[0]),
        "bus": apart((bus,))[0],
    }
    lengths = [
        min(length, arguments.longest or length) for length in LENGTHS["log-normal"]()[: arguments.ahead]
    ]
    texts, tokens = sized_texts(folder / NAMES[0], lengths)
    results["tokens_per_document"] = round(sum(tokens) / len(tokens), 1)
    print(json.dumps(results), flush=True)
    log = Path(tempfile.gettempdir()) / f"embedq-{arguments.name}-{os.getpid()}.log"
    with kafka_of(arguments.kafka) as servers:
        found, documents, trickle = asyncio.run(measure(servers, arguments, folder, texts, log))
    results |= found
    results["answered"] = {
        "documents": len(documents.answers),
        "lost": documents.sent - len(documents.answers),
        "twice": sum(times > 1 for times in documents.answers.values()),
        "failed": documents.failed[:5],
        "calls": len(trickle.calls),
        "calls_failed": trickle.failed[:5],
    }
    path = write(arguments.name, results, *GPU_PACKAGES, "aiokafka", "msgspec")
    results["vectors"] = compare(documents, trickle, folder, arguments.quantization, texts)
    path = write(arguments.name, results, *GPU_PACKAGES, "aiokafka", "msgspec")
    show(results)
    print(f"{time.monotonic() - arguments.began:.0f} s; written to {path}; the service's log: {log}")


if __name__ == "__main__":
    main()
