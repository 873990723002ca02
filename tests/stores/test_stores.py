"""`embedq run` into real stores: what is in them, and what a search in them finds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from embedq_batch import Columns, Sink
from embedq_batch.content.rows import RowId, Shape
from embedq_batch.errors import BadTarget
from embedq_batch.following.follow import NoParts
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sinks.sink import Followed
from embedq_sdk import late
from embedq_sdk.job_options import JobOptions
from embedq_shared.vectors import quantize
from tests.helpers.batch_runs import a_table, run
from tests.helpers.fake_service import NEW, OLD, FakeService, expected

COUNT = 300
IDS = [f"doc-{n}" for n in range(COUNT)]
TEXTS = [f"text {n}" for n in range(COUNT)]
COLUMNS = Columns(id="id", keep=("year",))


class Store(Protocol):
    """A store as its own client sees it."""

    to: str

    def count(self) -> int: ...
    def vectors(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]: ...
    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[RowId]: ...
    def columns(self, id: str) -> dict[str, Any]: ...


class Lance:
    def __init__(self, folder: Path) -> None:
        import lancedb

        self.to = f"lancedb:{folder}#docs"
        self._open: Callable[[], Any] = lambda: lancedb.connect(folder).open_table("docs")

    def count(self) -> int:
        return int(self._open().count_rows())

    def vectors(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        rows = self._open().to_arrow().to_pylist()
        return {row["id"]: np.asarray(row["vector"], np.float32) for row in rows if row["id"] in ids}

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[RowId]:
        return [row["id"] for row in self.rows_nearest(vector, "cosine", count)]

    def rows_nearest(self, vector: npt.NDArray[Any], kind: str, count: int) -> list[dict[str, Any]]:
        return list(self._open().search(vector).distance_type(kind).limit(count).to_list())

    def columns(self, id: str) -> dict[str, Any]:
        (row,) = [row for row in self._open().to_arrow().to_pylist() if row["id"] == id]
        return dict(row)


class Qdrant:
    def __init__(self, folder: Path) -> None:
        self.to = f"qdrant:{folder}#docs"
        self._folder = folder

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        from qdrant_client import QdrantClient

        client = QdrantClient(path=str(self._folder))  # one process at a time has it open
        try:
            return question(client)
        finally:
            client.close()

    def count(self) -> int:
        return int(self._ask(lambda client: client.count("docs").count))

    def _all(self) -> list[Any]:
        found = self._ask(lambda client: client.scroll("docs", limit=10_000, with_vectors=True))
        return list(found[0])

    def vectors(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        return {
            point.payload["id"]: np.asarray(point.vector, np.float32)
            for point in self._all()
            if point.payload["id"] in ids
        }

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[RowId]:
        found = self._ask(lambda client: client.query_points("docs", query=vector.tolist(), limit=count))
        return [point.payload["id"] for point in found.points]

    def columns(self, id: str) -> dict[str, Any]:
        (point,) = [point for point in self._all() if point.payload["id"] == id]
        return dict(point.payload)


class Milvus:
    def __init__(self, path: Path) -> None:
        self.to = f"milvus:{path}#docs"
        self._path = path

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        from pymilvus import MilvusClient

        client = MilvusClient(str(self._path))
        try:
            client.load_collection("docs")
            return question(client)
        finally:
            client.close()

    def count(self) -> int:
        return int(self._ask(lambda client: client.query("docs", output_fields=["count(*)"])[0]["count(*)"]))

    def vectors(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        rows = self._ask(lambda client: client.get("docs", list(ids), output_fields=["id", "vector"]))
        return {row["id"]: np.asarray(row["vector"], np.float32) for row in rows}

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[RowId]:
        found = self._ask(lambda client: client.search("docs", [vector.tolist()], limit=count))
        return [row["id"] for row in found[0]]

    def columns(self, id: str) -> dict[str, Any]:
        (row,) = self._ask(lambda client: client.get("docs", [id], output_fields=["*"]))
        return dict(row)


class Postgres:
    def __init__(self, address: str) -> None:
        self._address = address
        self._table = f"docs_{uuid.uuid4().hex[:8]}"
        self.to = f"{address}#{self._table}"

    def _ask(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        import pgvector.psycopg
        import psycopg

        with psycopg.connect(self._address) as connection:
            pgvector.psycopg.register_vector(connection)
            return connection.execute(query.replace("docs", self._table).encode(), arguments).fetchall()

    def count(self) -> int:
        return int(self._ask("select count(*) from docs")[0][0])

    def vectors(self, ids: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        rows = self._ask("select id, vector from docs where id = any(%s)", list(ids))
        return {id: vector.to_numpy() for id, vector in rows}

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[RowId]:
        return [
            id for (id,) in self._ask("select id from docs order by vector <=> %s limit %s", vector, count)
        ]

    def columns(self, id: str) -> dict[str, Any]:
        ((version, tokens, year),) = self._ask(
            "select model_version, tokens, year from docs where id = %s", id
        )
        return {"model_version": version, "tokens": tokens, "year": year}


@pytest.fixture(params=["lancedb", "qdrant", "milvus", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, in_memory: Path) -> Store:
    match request.param:
        case "lancedb":
            return Lance(tmp_path / "lance")
        case "qdrant":
            return Qdrant(in_memory / "qdrant")
        case "milvus":
            return Milvus(tmp_path / "milvus.db")
        case _:
            return Postgres(request.getfixturevalue("postgres").get_uri())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of stores on other machines are in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*")
async def test_a_table_in_a_store_is_searched_as_brute_force_searches_it_and_follows_its_source(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "in.parquet"
    a_table(path, TEXTS, id=IDS, year=range(COUNT))

    done = await run(str(path), store.to, columns=COLUMNS, check=20)

    assert (done.rows, done.failed, store.count()) == (COUNT, 0, COUNT)
    assert done.check is not None
    assert done.check.passed
    for id, vector in store.vectors(IDS[5:8]).items():
        assert np.allclose(vector, expected(TEXTS[IDS.index(id)]), atol=1e-6)
    columns = store.columns("doc-7")
    assert (columns["model_version"], columns["tokens"], columns["year"]) == (OLD, 2, 7)
    everything = np.stack([expected(text) for text in TEXTS])
    for question in ("one", "another"):
        vector = expected(question)
        best = [IDS[n] for n in np.argsort(-(everything @ vector))[:10]]
        assert store.nearest(vector, 10) == best

    texts = dict(zip(IDS, TEXTS, strict=True)) | {"doc-3": "changed", "new": "new"}
    del texts["doc-9"]
    a_table(path, list(texts.values()), id=list(texts), year=[1] * len(texts))
    service = FakeService(version=NEW)
    done = await run(
        str(path), store.to, service, columns=COLUMNS, only_changed=True, delete_missing=True, check=20
    )

    assert (done.rows, done.deleted, store.count()) == (COUNT, 1, COUNT)
    assert done.check is not None
    assert done.check.passed
    found = store.vectors(["doc-3", "doc-9", "new"])
    assert found.keys() == {"doc-3", "new"}
    assert np.allclose(found["doc-3"], expected("changed", salt=NEW), atol=1e-6)
    assert store.columns("doc-4")["model_version"] == NEW

    # A standing sink asks for the types of what it keeps.
    def types() -> pa.Schema | None:
        sink = followed(store)
        try:
            return sink.kept_types(["year", "none"])
        finally:
            sink.close()

    year = pa.schema([pa.field("year", pa.int64())])
    assert await asyncio.to_thread(types) == (None if isinstance(store, Qdrant | Milvus) else year)


@pytest.mark.filterwarnings("ignore:.*")
async def test_spans_of_a_row_that_became_shorter_leave_the_store(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "in.parquet"
    columns, job = Columns(id="id"), JobOptions(lane="bulk", chunk=late(10))
    a_table(path, ["a" * 45, "b" * 5], id=["x", "y"])
    await run(str(path), store.to, columns=columns, job=job)
    assert store.count() == 6

    a_table(path, ["c" * 12, "b" * 5], id=["x", "y"])
    await run(str(path), store.to, columns=columns, job=job, only_changed=True)

    assert store.count() == 3
    assert store.vectors(["x#0", "x#1", "x#2", "y#0"]).keys() == {"x#0", "x#1", "y#0"}

    # Where there is no manifest, as under a standing sink, the store itself knows which vectors a row has.
    shape = Shape(width=64, dtype="float32", spans=True, ids="string", kept=None, model_version=OLD)

    def deleted(rows: list[RowId], but: list[RowId]) -> None:
        sink = followed(store)
        sink.open(shape, NoParts(), force=False)
        sink.delete_spans(rows, but)
        sink.flush()
        sink.close()

    await asyncio.to_thread(deleted, ["x"], ["x#0"])
    assert store.vectors(["x#0", "x#1", "y#0"]).keys() == {"x#0", "y#0"}
    await asyncio.to_thread(deleted, ["x", "y"], [])
    assert store.count() == 0


def followed(store: Store) -> Followed:
    """The target of a standing sink."""
    sink = opened_sink(store.to)
    assert isinstance(sink, Followed)
    return sink


@pytest.mark.filterwarnings("ignore:.*")
async def test_a_store_of_other_vectors_is_refused_before_anything_is_written(
    tmp_path: Path, store: Store
) -> None:
    path = a_table(tmp_path / "in.parquet", TEXTS[:10], id=IDS[:10])
    columns = Columns(id="id")
    await run(path, store.to, columns=columns)

    with pytest.raises(BadTarget, match="expected"):
        await run(path, store.to, columns=columns, job=JobOptions(lane="bulk", dimensions=32), again=True)
    assert store.count() == 10


async def test_rows_that_postgresql_refuses_fail_alone(tmp_path: Path, postgres: Any) -> None:
    """A text may hold a null character, and a column of PostgreSQL must not."""
    titles = [f"title {n}" if n % 100 else f"bad\0{n}" for n in range(COUNT)]
    path = a_table(tmp_path / "in.parquet", TEXTS, id=IDS, title=titles)
    store = Postgres(postgres.get_uri())

    done = await run(path, store.to, columns=Columns(id="id", keep=("title",)))

    bad = COUNT // 100
    assert (done.rows, done.failed, store.count()) == (COUNT - bad, bad, COUNT - bad)


async def test_columns_of_every_kind_are_in_postgresql_as_they_were(tmp_path: Path, postgres: Any) -> None:
    import psycopg

    columns: dict[str, list[Any]] = {
        "whole": [1, -(1 << 63)],
        "few": [None, 7],
        "real": [0.5, None],
        "yes": [True, None],
        "day": [date(2026, 1, 2), None],
        "moment": [datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), None],
        "price": [Decimal("1.25"), None],
        "raw": [b"\0x", None],
        "title": ["Käse", None],
        "tags": [["a", "b"], None],
    }
    path = a_table(tmp_path / "in.parquet", TEXTS[:2], id=IDS[:2], **columns)
    store = Postgres(postgres.get_uri())

    done = await run(path, store.to, columns=Columns(id="id", keep=tuple(columns)), check=2)

    assert (done.rows, done.failed) == (2, 0)
    with psycopg.connect(postgres.get_uri()) as connection:
        query = f"select {', '.join(columns)} from {store.to.rpartition('#')[2]} order by id"
        assert connection.execute(query.encode()).fetchall() == list(zip(*columns.values(), strict=True))


@pytest.mark.parametrize("dtype", ["float16", "binary"])
async def test_postgresql_keeps_short_vectors_as_such(tmp_path: Path, postgres: Any, dtype: Any) -> None:
    path = a_table(tmp_path / "in.parquet", TEXTS[:50], id=IDS[:50])
    store = Postgres(postgres.get_uri())

    done = await run(
        path, store.to, columns=Columns(id="id"), job=JobOptions(lane="bulk", dtype=dtype), check=50
    )

    assert done.check is not None
    assert done.check.passed


async def test_lancedb_keeps_bits_and_finds_the_nearest_by_their_hamming_distance(tmp_path: Path) -> None:
    path = a_table(tmp_path / "in.parquet", TEXTS[:100], id=IDS[:100])
    store = Lance(tmp_path / "lance")

    done = await run(
        path, store.to, columns=Columns(id="id"), job=JobOptions(lane="bulk", dtype="binary"), check=50
    )

    assert done.check is not None
    assert done.check.passed
    bits = [np.frombuffer(quantize(expected(text), "binary")[0], np.uint8) for text in TEXTS[:100]]
    distances = [int(np.unpackbits(each ^ bits[7]).sum()) for each in bits]
    found = store.rows_nearest(bits[7], "hamming", 10)
    assert found[0]["id"] == "doc-7"
    assert [row["_distance"] for row in found] == sorted(distances)[:10]


def test_a_password_is_not_shown() -> None:
    sink: Sink = opened_sink("postgresql://me:secret@db/x#docs")

    assert sink.name == "postgresql://me@db/x#docs"
    assert "secret" not in str(sink.manifest)
