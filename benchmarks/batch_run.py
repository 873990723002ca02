"""`embedq run` on many short rows, from Parquet to Parquet: what kills leave, memory, and rows a second beside the SDK's bare stream.

A Kafka of its own, and replicas of a tiny random model (`--replicas 0`: a fake service that sends zeros, for the client alone).

`--kills`: the runner, a replica and the broker, and with `--redis` Redis, are killed with SIGKILL, each once, at random points, and the
same command ends the run. Then each id must be there once, and every vector must be the one that sentence-transformers gives for its text.

`--client N`: the same comparison without Kafka, N rounds in one process, whose replies are ready before they are asked for: processor
time of a row, and of it the event loop's. On a busy machine this is steadier than a rate.

`--rounds N`: the bare stream and the command in turn, N times each, each a process of its own, on texts that nobody saw before. What is
compared is rows a second from the client's first step to the last one, imports left out, and the processor time of a row.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import write
from benchmarks.ready_replies import Replies, job_sizes, ready_client
from embedq_batch import Columns, RunOptions
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.running.progress import Progress
from embedq_batch.running.run import Parts, execute
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from embedq_sdk import EmbedClient
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
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
_TIMED: Final = (
    "import atexit, sys; import embedq_batch.api, embedq_batch.sources.parquet, embedq_batch.sinks.parts, embedq_batch.sinks.finals\n"
    "from benchmarks.batch_run import cpu_of_this_process\n"
    "before = cpu_of_this_process()\n"
    "atexit.register(lambda: print('cpu', cpu_of_this_process() - before, file=sys.stderr))\n"
) + _PROGRAM
"""All imports, and then the command."""
_FLUSHES: Final = "from embedq_batch.running import writing; writing._FLUSH_ROWS = {rows}; "
"""What is done is written down each so many rows: a short run must be far enough to be killed."""
_STREAM: Final = "import sys; from benchmarks.batch_run import stream_alone; stream_alone(*sys.argv[1:])"
_SERVED: Final = "import asyncio, sys; from tests.helpers.responder import Responder\n" + (
    "async def serve():\n"
    "    async with Responder(sys.argv[1], sys.argv[2], keep=False, compute=False):\n"
    "        print('ready', flush=True)\n"
    "        await asyncio.Event().wait()\n"
    "asyncio.run(serve())"
)
_LOOKED_S: Final = 0.1
_MORE_EACH: Final = 10
"""Looks at the manifest for one at memory and disk."""
_SAID_S: Final = 30.0
_AWAY_S: Final = 5.0
"""How long Redis is not there."""
_LONGEST_S: Final = 600.0
_FEWEST_A_SECOND: Final = 250
"""Rows; a run with its kills that is slower has come to a standstill."""
_DIMENSIONS: Final = 64
_ENCODED: Final = 50_000
"""Texts that sentence-transformers is given at once."""
_KAFKA: Final = {
    "log.segment.bytes": str(32 << 20),
    "log.retention.bytes": str(128 << 20),
    "log.retention.check.interval.ms": "5000",
}
"""A million replies are read within a second, and need not stay on the disk. Of jobs, four partitions have 20 MB each."""
_SAME: Final = 1e-4
"""Of the numbers of a vector of length 1: the replicas compute texts in other micro-batches than sentence-transformers does."""


def text(number: int, salt: str = "") -> str:
    """Six words that no other row has."""
    words = [_WORDS[number // len(_WORDS) ** place % len(_WORDS)] for place in range(4)]
    return f"{' '.join(words)} number {number}{salt}"


def make_source(path: Path, rows: int, distinct: int, salt: str = "") -> None:
    """A table of `id` and `text`, with so many different texts."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100_000):
            ids = range(start, min(start + 100_000, rows))
            texts = [text(n % distinct, salt) for n in ids]
            writer.write_table(pa.table({"id": list(ids), "text": texts}, schema=schema))


def stream_alone(servers: str, prefix: str, rows: str, salt: str) -> None:
    """The SDK's stream on texts of its own, in the lane and with the jobs of the command; prints rows a second and CPU seconds."""

    async def stream() -> float:
        texts = (text(n, salt) for n in range(int(rows)))
        started = time.monotonic()
        async with EmbedClient(servers, topic_prefix=prefix) as client:
            async for _ in client.stream(
                texts, lane="bulk", batch_size=64, in_flight=4096, ordered=True, timeout=86_400
            ):
                pass
        return int(rows) / (time.monotonic() - started)

    before = cpu_of_this_process()
    rate = asyncio.run(stream())
    print(rate, cpu_of_this_process() - before)


def cpu_of_this_process() -> float:
    """Seconds of processor time so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Runner:
    """The command as a process, and the memory that it took."""

    def __init__(self, environ: dict[str, str], *arguments: str, rows: int) -> None:
        flush_rows = min(20_000, rows // 20)
        self._command = [sys.executable, "-c", _FLUSHES.format(rows=flush_rows) + _PROGRAM, *arguments]
        self._environ = os.environ | environ
        self.memory: list[list[int]] = []
        """Bytes resident at each look, of each process."""
        self.until = time.monotonic() + _LONGEST_S + rows / _FEWEST_A_SECOND
        self.disk = 0
        """Most bytes of Kafka's folder at a look."""

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=self._environ, stderr=subprocess.PIPE)
        self.memory.append([])

    def look(self) -> None:
        try:
            self.memory[-1].append(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return


def rows_done(manifest: Path) -> int:
    """About how many: ids are the rows' numbers, and are written in their order. A count of a million would slow what is measured."""
    try:
        with closing(sqlite3.connect(f"file:{manifest}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute("select coalesce(max(id) + 1, 0) from done").fetchone()[0])
    except sqlite3.Error:
        return 0


async def until(runner: Runner, manifest: Path, kafka: Path, reached: Callable[[int], bool]) -> bool:
    """Wait until the manifest has so many rows; False when the process ended before.

    Raises:
        TimeoutError: it takes far longer than it should.
    """
    looks, said = 0, time.monotonic()
    while runner.process.poll() is None:
        if time.monotonic() > runner.until:
            runner.process.kill()
            raise TimeoutError(f"{rows_done(manifest):,} rows are done, and the run goes on no more")
        done = await asyncio.to_thread(rows_done, manifest)
        if looks % _MORE_EACH == 0:
            runner.look()
            runner.disk = max(runner.disk, await asyncio.to_thread(bytes_in, kafka))
        if time.monotonic() - said >= _SAID_S:
            said = time.monotonic()
            print(f"{done:,} rows, Kafka has {runner.disk >> 20:,} MiB at most", flush=True)
        if reached(done):
            return True
        looks += 1
        await asyncio.sleep(_LOOKED_S)
    return False


def bytes_in(folder: Path) -> int:
    """Of the blocks of all files of a folder, some of which may go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.stat().st_blocks * 512
    return found


# -- kills -------------------------------------------------------------------------------------------------------------------


async def killed(
    stack: DevStack, topics: Topics, replicas: list[Replica], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """A run in which everything is killed once."""
    environ = {"EMBEDQ_KAFKA_SERVERS": stack.kafka_servers, "EMBEDQ_TOPIC_PREFIX": topics.prefix}
    source, out = folder / "in.parquet", folder / "out.parquet"
    manifest = folder / "out.parquet.embedq" / MANIFEST
    await asyncio.to_thread(make_source, source, options.rows, options.distinct)
    command = ("--from", str(source), "--to", str(out), "--id-column", "id", "--check", "1000")
    runner = Runner(environ, *command, rows=options.rows)
    chance = random.Random(options.seed)
    victims = ["runner", "replica", "broker", *(["redis"] if options.redis else [])]
    chance.shuffle(victims)
    points = sorted(chance.uniform(0.1, 0.75) for _ in victims)  # what is left is enough to be seen
    kills: list[dict[str, Any]] = []
    coming: list[asyncio.Task[None]] = []
    started = time.monotonic()
    runner.start()
    for victim, point in zip(victims, points, strict=True):
        target = point * options.rows
        if not await until(runner, manifest, stack.directory, lambda done, target=target: done >= target):  # type: ignore[misc]
            break
        done = await asyncio.to_thread(rows_done, manifest)
        if done >= options.rows:
            break  # nothing is left that could be disturbed
        kills.append({"victim": victim, "rows_done": done})
        print(f"{victim} killed at {kills[-1]['rows_done']:,} rows", flush=True)
        if victim == "runner":
            runner.process.kill()
            await asyncio.to_thread(runner.process.communicate)
            runner.start()
        elif victim == "replica":
            replicas[0].kill()
            await replicas[0].ended()
            await replicas[0].start(ready=False)
        elif victim == "redis":
            await asyncio.to_thread(stack.stop_redis, kill=True)
            coming.append(asyncio.create_task(_redis_comes_back(stack)))
        else:
            await asyncio.to_thread(stack.stop_kafka, kill=True)
            await asyncio.to_thread(stack.start_kafka)
    await until(runner, manifest, stack.directory, lambda done: False)
    await asyncio.gather(*coming)
    said = (await asyncio.to_thread(runner.process.communicate))[1].decode()
    seconds = time.monotonic() - started
    print(said, flush=True)
    ids = pq.read_table(out, columns=["id"]).column("id").to_numpy()
    reference = await asyncio.to_thread(references, folder / "model", options.distinct)
    wrong, furthest, versions = await asyncio.to_thread(compared, out, reference)
    return {
        "rows": options.rows,
        "different_texts": options.distinct,
        "exit_code": runner.process.returncode,
        "said": said.splitlines(),
        "killed": kills,
        "kills_wanted": len(victims),
        "seconds": round(seconds, 1),
        "rows_a_second_with_kills": round(options.rows / seconds),
        "ids": len(ids),
        "ids_once": bool(np.array_equal(np.sort(ids), np.arange(options.rows))),
        "vectors_compared": options.rows,
        "wrong_vectors": wrong,
        "largest_difference": furthest,
        "model_versions": versions,
        "memory_mib": [_memory(looks) for looks in runner.memory],
        "kafka_mib_at_most": runner.disk >> 20,
    }


async def _redis_comes_back(stack: DevStack) -> None:
    await asyncio.sleep(_AWAY_S)
    await asyncio.to_thread(stack.start_redis)


def _memory(looks: list[int]) -> dict[str, int]:
    """MiB resident of a process after a tenth of its life, in the middle, at nine tenths, and at most after the first tenth."""
    if len(looks) < 10:
        return {}
    mib = [round(each / 2**20) for each in looks]
    places = {"at_10_%": 0.1, "at_50_%": 0.5, "at_90_%": 0.9}
    return {name: mib[int(len(mib) * place)] for name, place in places.items()} | {
        "most": max(mib[len(mib) // 10 :])
    }


def references(model: Path, distinct: int) -> npt.NDArray[np.float32]:
    """What sentence-transformers gives for each text."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(model), device="cpu")
    found = np.empty((distinct, _DIMENSIONS), np.float32)
    for start in range(0, distinct, _ENCODED):  # it keeps an object for each text until all are done
        end = min(start + _ENCODED, distinct)
        texts = [text(n) for n in range(start, end)]
        found[start:end] = encoder.encode(texts, batch_size=512, show_progress_bar=False)
    return found


def compared(out: Path, reference: npt.NDArray[np.float32]) -> tuple[int, float, list[str]]:
    """How many vectors of a file are not the reference's, the largest difference of a number, and the model versions."""
    wrong, furthest = 0, 0.0
    versions: set[str] = set()
    for batch in _batches(out):
        ids = batch.column("id").to_numpy()
        vectors = batch.column("vector").flatten().to_numpy().reshape(len(ids), -1)
        differences = np.abs(vectors - reference[ids % len(reference)]).max(axis=1)
        wrong += int((differences > _SAME).sum())
        furthest = max(furthest, float(differences.max()))
        versions |= set(batch.column("model_version").unique().to_pylist())
    return wrong, furthest, sorted(versions)


def _batches(out: Path) -> Iterator[Any]:
    with pq.ParquetFile(out) as file:
        yield from file.iter_batches(50_000, columns=["id", "vector", "model_version"])


# -- beside the stream -------------------------------------------------------------------------------------------------------


async def rounds(servers: str, topics: Topics, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Stream and command in turn; the first to begin changes from round to round."""
    environ = {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": topics.prefix}
    found: list[dict[str, float]] = []
    for n in range(options.rounds):
        measured: dict[str, float] = {}
        for what in ("stream", "run") if n % 2 == 0 else ("run", "stream"):
            if what == "stream":
                rate, cpu = await asyncio.to_thread(_stream, servers, topics.prefix, options.rows, f" s{n}")
            else:
                source, out = folder / f"in{n}.parquet", folder / f"out{n}.parquet"
                await asyncio.to_thread(make_source, source, options.rows, options.rows, f" r{n}")
                rate, cpu = await asyncio.to_thread(_run, environ, source, out)
                out.unlink()
            measured |= {what: rate, f"{what}_cpu": cpu}
        found.append(measured)
        print(
            f"round {n + 1}: " + ", ".join(f"{name} {value:,.1f}" for name, value in measured.items()),
            flush=True,
        )
    runs, streams = ([each[name] for each in found] for name in ("run", "stream"))
    return {
        "rounds": options.rounds,
        "rows_a_round": options.rows,
        "run_rows_a_second": [round(rate) for rate in runs],
        "stream_rows_a_second": [round(rate) for rate in streams],
        "share_of_the_stream": round(statistics.median(runs) / statistics.median(streams), 3),
        "run_cpu_us_a_row": [round(each["run_cpu"] / options.rows * 1e6, 1) for each in found],
        "stream_cpu_us_a_row": [round(each["stream_cpu"] / options.rows * 1e6, 1) for each in found],
    }


def _stream(servers: str, prefix: str, rows: int, salt: str) -> tuple[float, float]:
    said = subprocess.run(
        [sys.executable, "-c", _STREAM, servers, prefix, str(rows), salt],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return float(said[0]), float(said[1])


def _run(environ: dict[str, str], source: Path, out: Path) -> tuple[float, float]:
    """Rows a second, as the command says them, from its first step to the file under its name; and CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, "--from", str(source), "--to", str(out), "--id-column", "id"],
        env=os.environ | environ,
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"\(([\d,]+) rows/s", done.stderr)
    cpu = re.search(r"^cpu ([\d.]+)$", done.stderr, re.MULTILINE)
    if found is None or cpu is None:
        raise RuntimeError(done.stderr)
    return float(found.group(1).replace(",", "")), float(cpu.group(1))


# -- the client alone --------------------------------------------------------------------------------------------------------


def client_alone(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Processor time of a row, in microseconds: of the whole process, and of the event loop's thread."""
    rows = options.rows
    source = folder / "in.parquet"
    make_source(source, rows, rows)
    vectors = np.random.default_rng(0).standard_normal((rows, _DIMENSIONS), np.float32)
    in_a_row = Replies(vectors, job_sizes(rows, rows))
    in_batches = Replies(vectors, job_sizes(rows))

    async def stream(out: Path) -> None:
        async with ready_client(in_a_row, probes=0) as client:
            texts = (text(n) for n in range(rows))
            async for _ in client.stream(
                texts, lane="bulk", batch_size=64, in_flight=4096, ordered=True, timeout=86_400
            ):
                pass

    async def command(out: Path) -> None:
        async with ready_client(in_batches, probes=1) as client:
            await execute(
                Parts(
                    source=opened_source([str(source)], Columns(id="id")),
                    sink=opened_sink(str(out)),
                    client=client,
                    options=RunOptions(),
                    progress=Progress(time.monotonic()),
                )
            )

    found: dict[str, list[float]] = {}
    for n in range(options.client):
        for name, work in (("stream", stream), ("run", command)):
            whole, loop = time.process_time(), time.thread_time()
            asyncio.run(work(folder / f"out{n}.parquet"))
            for what, spent in (("", time.process_time() - whole), ("_loop", time.thread_time() - loop)):
                found.setdefault(f"{name}{what}_cpu_us_a_row", []).append(round(spent / rows * 1e6, 2))
    medians = {name: statistics.median(spent) for name, spent in found.items()}
    return {
        "rows_a_round": rows,
        "dimensions": _DIMENSIONS,
        "rows_with_late_replies": in_a_row.late + in_batches.late,
        **found,
        "stream_to_run": round(medians["stream_cpu_us_a_row"] / medians["run_cpu_us_a_row"], 3),
        "stream_to_run_loop": round(
            medians["stream_loop_cpu_us_a_row"] / medians["run_loop_cpu_us_a_row"], 3
        ),
    }


async def measured(stack: DevStack, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    topics = await make_topics(stack, fresh_prefix())
    async with AsyncExitStack() as exits:
        if options.replicas:
            make_tiny_bert(folder / "model", hidden=_DIMENSIONS)
        replicas = [
            Replica(stack, topics, folder / "model", folder / f"replica{n}.log", redis=options.redis)
            for n in range(options.replicas)
        ]
        for replica in replicas:
            await replica.start()
            exits.push_async_callback(replica.stop)
        if not replicas:
            fake = subprocess.Popen(  # noqa: ASYNC220  # nothing else waits yet
                [sys.executable, "-c", _SERVED, stack.kafka_servers, topics.prefix], stdout=subprocess.PIPE
            )
            exits.callback(fake.kill)
            assert fake.stdout is not None
            await asyncio.to_thread(fake.stdout.readline)
        found: dict[str, Any] = {
            "service": f"{options.replicas} replicas of a tiny BERT of {_DIMENSIONS} dimensions{', Redis' if options.redis else ''}"
            if replicas
            else f"fake, zeros of {_DIMENSIONS} dimensions",
        }
        if options.rounds:
            found |= await rounds(stack.kafka_servers, topics, options, folder)
        if options.kills:
            found |= await killed(stack, topics, replicas, options, folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--distinct", type=int, help="different texts among them; default: all")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--redis", action="store_true", help="the replicas keep vectors in Redis")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--client", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="batch_run")
    options = parser.parse_args()
    options.distinct = options.distinct or options.rows
    if options.kills and not options.replicas:
        parser.error("--kills needs replicas")
    with tempfile.TemporaryDirectory() as folder:
        if options.client:
            found = client_alone(options, Path(folder))
        else:
            with DevStack(report=print, kafka_properties=_KAFKA) as stack:
                found = asyncio.run(measured(stack, options, Path(folder)))
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    write(options.name, found, "embedq", "pyarrow", "aiokafka", "xxhash")
    return (
        1
        if options.kills
        and (
            found["exit_code"]
            or not found["ids_once"]
            or found["wrong_vectors"]
            or len(found["killed"]) < found["kills_wanted"]
        )
        else 0
    )


if __name__ == "__main__":
    raise SystemExit(main())
