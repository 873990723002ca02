"""A table of texts to a table of vectors, rows a second: `embedq run`, a plain sentence-transformers script, and Ray Data where it is installed.

The same rows and model (all-MiniLM-L6-v2) on the same cores, each way in turn in every round. What is timed is from the first row that
is read to the file that is written: models are loaded, replicas are ready and Ray's cluster runs before. embedq has as many replicas as
there are cores, of one thread each; Ray Data as many actors.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import write
from benchmarks.texts import distinct
from embedq_sdk.dev import DevStack
from tests.helpers.service_process import Replica, fresh_prefix, make_topics
from tests.helpers.tiny_models import minilm_path

_EMBEDQ: Final = "from embedq_batch.command import run; run(prog_name='embedq run')"
_OTHER: Final = "import sys; from benchmarks.batch_peers import {way}; {way}(*sys.argv[1:])"
_AT_ONCE: Final = 64
"""Texts in a job of ours, and in one call of the others' model."""


class Encoder:
    """What Ray Data's actors run."""

    def __init__(self, model: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(1)
        self._model = SentenceTransformer(model, device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        vectors = self._model.encode(list(batch["text"]), batch_size=_AT_ONCE, show_progress_bar=False)
        return {"id": batch["id"], "vector": np.asarray(vectors, np.float32)}


def script(source: str, out: str, model: str) -> None:
    """What one writes in ten minutes: read, encode, write; prints rows a second."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    encoder.encode(["a text"], show_progress_bar=False)
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), 384))])
    started = time.monotonic()
    rows = 0
    with pq.ParquetFile(source) as file, pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in file.iter_batches(1024):
            vectors = encoder.encode(
                batch.column("text").to_pylist(), batch_size=_AT_ONCE, show_progress_bar=False
            )
            flat = pa.array(np.asarray(vectors, np.float32).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, 384)
            writer.write_batch(pa.record_batch([batch.column("id"), column], schema=schema))
            rows += batch.num_rows
    print(rows / (time.monotonic() - started))


def ray(source: str, out: str, model: str) -> None:
    """Ray Data with an actor for each core; prints rows a second."""
    import ray as cluster
    from ray import data

    cores = os.cpu_count() or 1
    cluster.init(num_cpus=cores + 1, include_dashboard=False, log_to_driver=False)
    started = time.monotonic()
    blocks = 4 * cores  # one file is one block otherwise, and keeps one actor busy
    found = data.read_parquet(source, override_num_blocks=blocks).map_batches(
        Encoder, fn_constructor_args=(model,), concurrency=cores, batch_size=512, num_cpus=1
    )
    found.write_parquet(out)
    print(pq.ParquetFile(source).metadata.num_rows / (time.monotonic() - started))


def other(way: str, source: Path, out: Path, model: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _OTHER.format(way=way), str(source), str(out), str(model)],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def embedq(environ: dict[str, str], source: Path, out: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _EMBEDQ, "--from", str(source), "--to", str(out), "--id-column", "id"],
        env=os.environ | environ,
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"\(([\d,]+) rows/s", done.stderr)
    if found is None:
        raise RuntimeError(done.stderr)
    return float(found.group(1).replace(",", ""))


async def measured(stack: DevStack, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = minilm_path()
    topics = await make_topics(stack, fresh_prefix())
    environ = {"EMBEDQ_KAFKA_SERVERS": stack.kafka_servers, "EMBEDQ_TOPIC_PREFIX": topics.prefix}
    others = ["script", *(["ray"] if importlib.util.find_spec("ray") else [])]
    rates: dict[str, list[float]] = {way: [] for way in ("embedq", *others)}
    least = 1.0
    async with AsyncExitStack() as exits:
        for n in range(os.cpu_count() or 1):
            replica = Replica(stack, topics, model, folder / f"replica{n}.log", redis=False)
            await replica.start()
            exits.push_async_callback(replica.stop)
        for n in range(options.rounds):
            source = folder / f"in{n}.parquet"
            table = {"id": list(range(options.rows)), "text": distinct(options.rows, f" r{n} ")}
            pq.write_table(pa.table(table), source)
            ours = folder / f"embedq{n}.parquet"
            for way, found in rates.items():
                if way == "embedq":
                    rate = await asyncio.to_thread(embedq, environ, source, ours)
                else:
                    rate = await asyncio.to_thread(other, way, source, folder / f"{way}{n}.parquet", model)
                found.append(rate)
                print(f"round {n + 1}, {way}: {rate:,.0f} rows/s", flush=True)
            least = min(least, _least_cosine(ours, folder / f"script{n}.parquet"))
    medians = {way: statistics.median(found) for way, found in rates.items()}
    return {
        "rows": options.rows,
        "rounds": options.rounds,
        "rows_a_second": {way: [round(rate) for rate in found] for way, found in rates.items()},
        "embedq_to": {way: round(medians["embedq"] / medians[way], 2) for way in others},
        "least_cosine": round(least, 6),
    }


def _least_cosine(one: Path, other: Path) -> float:
    """Of the vectors of two files, by id."""
    found = []
    for path in (one, other):
        table = pq.read_table(path, columns=["id", "vector"])
        vectors = np.stack(table.column("vector").to_pylist())
        found.append(vectors[np.argsort(table.column("id").to_numpy())])
    norms = np.linalg.norm(found[0], axis=1) * np.linalg.norm(found[1], axis=1)
    return float(((found[0] * found[1]).sum(axis=1) / norms).min())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="batch_peers")
    options = parser.parse_args()
    with DevStack(report=print) as stack, tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measured(stack, options, Path(folder)))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<16} {value}")
    write(options.name, found, "embedq", "sentence-transformers", "torch", "pyarrow", "ray")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
