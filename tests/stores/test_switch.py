"""A name that readers use, switched to what a new model made, and back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from embedq_batch import Columns
from embedq_batch.switch_command import switch
from tests.helpers.batch_runs import a_table, run, vectors_in
from tests.helpers.fake_service import NEW, FakeService, expected

COUNT = 200
TEXTS = [f"text {n}" for n in range(COUNT)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def both(tmp_path: Path, old: str, new: str) -> None:
    """Two targets of one table: the old model's, and the new one's."""
    source = a_table(tmp_path / "in.parquet", TEXTS, id=range(COUNT))
    await run(source, old, columns=Columns(id="id"))
    await run(source, new, FakeService(version=NEW), columns=Columns(id="id"))


def switched(alias: str, target: str, *more: str) -> str:
    done = CliRunner().invoke(switch, [alias, "--to", target, *more])
    assert done.exit_code == 0, done.output
    return done.output


def is_of(vector: Any, salt: str) -> bool:
    return bool(np.allclose(np.asarray(vector, np.float32), expected("text 7", salt=salt), atol=1e-6))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", ["qdrant", "milvus"])
async def test_an_alias_means_the_new_collection_and_the_old_one_again(
    tmp_path: Path, in_memory: Path, kind: str
) -> None:
    place = in_memory / "qdrant" if kind == "qdrant" else tmp_path / "milvus.db"
    old, new = f"{kind}:{place}#old", f"{kind}:{place}#new"
    await both(tmp_path, old, new)

    def read() -> Any:
        if kind == "qdrant":
            from qdrant_client import QdrantClient

            client: Any = QdrantClient(path=str(place))
            point = client.query_points("docs", query=7, limit=1, with_vectors=True).points
            vector = client.retrieve("docs", [7], with_vectors=True)[0].vector if point else None
        else:
            from pymilvus import MilvusClient

            client = MilvusClient(str(place))
            client.load_collection("docs")
            vector = client.get("docs", [7], output_fields=["vector"])[0]["vector"]
        client.close()
        return vector

    import asyncio

    def all_of_it() -> None:
        switched("docs", old)
        before = read()
        assert "it was old" in switched("docs", new)
        after = read()
        assert "it was new" in switched("docs", old)
        again = read()
        assert not np.allclose(before, after)
        assert is_of(after, NEW)
        assert np.allclose(before, again)

    await asyncio.to_thread(all_of_it)


async def test_no_query_fails_while_a_view_is_switched(tmp_path: Path, postgres: Any) -> None:
    import asyncio

    address = postgres.get_uri()
    old, new = f"{address}#switch_old", f"{address}#switch_new"
    await both(tmp_path, old, new)
    switched_to = await asyncio.to_thread(switched, "switch_docs", old)
    assert "switch_docs is " in switched_to
    ended = threading.Event()
    counts: list[int] = []

    def query() -> None:
        with psycopg.connect(address, autocommit=True) as connection:
            while not ended.is_set():
                row = connection.execute(
                    "select count(*), count(distinct model_version) from switch_docs"
                ).fetchone()
                assert row == (COUNT, 1)
                counts.append(1)

    def switches() -> None:
        for target in (new, old) * 5:
            switched("switch_docs", target)

    asking = asyncio.create_task(asyncio.to_thread(query))
    await asyncio.to_thread(switches)
    ended.set()
    await asking
    assert counts


async def test_a_link_means_the_new_file_and_what_is_not_complete_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    old, new = str(tmp_path / "old.parquet"), str(tmp_path / "new.parquet")
    await both(tmp_path, old, new)
    link = tmp_path / "docs.parquet"

    def all_of_it() -> None:
        switched(str(link), old)
        assert "it was old.parquet" in switched(str(link), new)
        assert is_of(vectors_in(link)[7], NEW)
        refused = CliRunner().invoke(switch, [old, "--to", new])
        assert refused.exit_code == 1
        assert "a file of its own" in refused.output
        (tmp_path / "new.npy").touch()
        refused = CliRunner().invoke(switch, [str(tmp_path / "docs.npy"), "--to", str(tmp_path / "new.npy")])
        assert refused.exit_code == 1
        assert "a pointer file" in refused.output

    await asyncio.to_thread(all_of_it)
