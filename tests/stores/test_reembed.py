"""`embedq reembed` in real stores, while readers search what serves: one step to the new model, no search fails, and the old one can come back."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import psycopg
import pytest

from embedq_batch import Columns
from embedq_batch.corpus.figures import Figures
from embedq_batch.corpus_command import show
from embedq_batch.reembed_command import reembed
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sinks.sink import Counted
from embedq_batch.switch_command import switch
from embedq_sdk.cli.commands import status
from embedq_sdk.job_options import JobOptions
from tests.helpers.batch_runs import a_table, invoked, run, two_models
from tests.helpers.fake_service import NEW, OLD, expected
from tests.helpers.support import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*")

KINDS = ("lancedb", "qdrant", "milvus", "postgresql")
Found = list[tuple[Any, str]]
"""Ids and model versions of what a search gives."""


class Store:
    """A store as its readers see it: `alias` is the name that they use."""

    def __init__(self, kind: str, place: str, alias: str) -> None:
        self.kind = kind
        self._place = place
        self.alias = alias
        mark = uuid.uuid4().hex[:8]
        self.old, self.new = f"{place}#old_{mark}", f"{place}#new_{mark}"

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Found]]:
        """What searches for a text's five neighbors, through the alias."""
        match self.kind:
            case "lancedb":
                import lancedb

                def ask(text: str) -> Found:
                    target = msgspec.json.decode(Path(self.alias).read_bytes())["target"]
                    place, _, name = target.removeprefix("lancedb:").rpartition("#")
                    rows = lancedb.connect(place).open_table(name).search(expected(text)).limit(5).to_list()
                    return [(row["id"], row["model_version"]) for row in rows]

                yield ask
            case "qdrant":
                from embedq_batch.clients.qdrant import connected, let_go

                folder = self._place.removeprefix("qdrant:")
                client = connected(folder)  # a folder is open once in a process
                yield lambda text: [
                    (point.payload["id"], point.payload["model_version"])
                    for point in client.query_points(
                        self.alias, query=expected(text).tolist(), limit=5
                    ).points
                    if point.payload is not None
                ]
                let_go(folder, client)
            case "milvus":
                from pymilvus import MilvusClient

                milvus = MilvusClient(self._place.removeprefix("milvus:"))
                yield lambda text: [
                    (row["id"], row["entity"]["model_version"])
                    for row in milvus.search(
                        self.alias, [expected(text).tolist()], limit=5, output_fields=["model_version"]
                    )[0]
                ]
                milvus.close()
            case _:
                import pgvector.psycopg

                with psycopg.connect(self._place, autocommit=True) as connection:
                    pgvector.psycopg.register_vector(connection)
                    query = f"select id, model_version from {self.alias} order by vector <=> %s limit 5"
                    yield lambda text: connection.execute(query.encode(), (expected(text),)).fetchall()


@pytest.fixture(params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    monkeypatch.chdir(tmp_path)
    match request.param:
        case "lancedb":
            return Store("lancedb", f"lancedb:{tmp_path}/lance", str(tmp_path / "docs.json"))
        case "qdrant":
            return Store("qdrant", f"qdrant:{in_memory}/qdrant", "docs")
        case "milvus":
            return Store("milvus", f"milvus:{tmp_path}/milvus.db", "docs")
        case _:
            address = request.getfixturevalue("postgres").get_uri()
            return Store("postgresql", address, f"docs_{uuid.uuid4().hex[:8]}")


class Searching:
    """A reader that searches fifty times a second, on a thread of its own; what it found, and what failed."""

    def __init__(self, ask: Callable[[str], Found]) -> None:
        self._ask = ask
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._search)
        self.versions: list[str] = []
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _search(self) -> None:
        for n in itertools.count():
            if self._ended.wait(0.02):  # without a pause it would take the interpreter from the run
                return
            try:
                found = self._ask(f"question {n}")
            except Exception as error:  # noqa: BLE001  # whatever a search raises, it failed
                self.failures.append(repr(error))
                continue
            if len(found) != 5 or len({version for _, version in found}) != 1:
                self.failures.append(f"found {found}")
            self.versions.append(found[0][1])

    def more(self, version: str) -> None:
        """Wait until searches that began from now on find this version, and nothing else."""
        at = len(self.versions) + 1  # one may be under way
        wait_for(lambda: len(self.versions) > at + 3 or bool(self.failures), what="searches")
        assert not self.failures
        assert set(self.versions[at:]) == {version}

    @property
    def steps(self) -> list[str]:
        """The versions that were found, one after the other, each once for as long as it was found."""
        return [version for version, _ in itertools.groupby(self.versions)]


@pytest.mark.parametrize(
    "count", [400, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])]
)
def test_a_new_model_takes_over_in_one_step_while_readers_search_and_the_old_one_comes_back(
    tmp_path: Path, store: Store, count: int
) -> None:
    texts = [f"text {n}" for n in range(count)]
    source = a_table(tmp_path / "in.parquet", texts, id=[f"doc-{n}" for n in range(count)], year=[1] * count)
    columns = Columns(id="id", keep=("text", "year"))
    asyncio.run(run(source, store.old, two_models(), columns=columns))
    assert invoked(switch, store.alias, "--to", store.old).exit_code == 0
    with store.reader() as ask, Searching(ask) as readers:
        readers.more(OLD)

        done = invoked(reembed, "--of", store.old, "--to", store.new, "--model", "new", "--check", "20")

        assert done.exit_code == 0, done.output
        assert f"coverage 100 %: {count:,} of {count:,} rows under sha256:bbbbbbbbbbbb (new)" in done.output
        assert f"in the store: {count:,} vectors, {count:,} of them of this version\n" in done.output
        readers.more(OLD)
        done = invoked(switch, store.alias, "--to", store.new)
        assert done.exit_code == 0, done.output
        readers.more(NEW)
        back = shlex.split(done.output.partition("back: embedq switch ")[2])
        assert invoked(switch, *back).exit_code == 0
        readers.more(OLD)
        steps = readers.steps
    assert steps == [OLD, NEW, OLD]
    assert not readers.failures
    for target, salt in ((store.old, OLD), (store.new, NEW)):
        sink = opened_sink(target)
        assert isinstance(sink, Counted)
        assert (sink.stored(), sink.stored(salt)) == (count, count)
        (vector,) = sink.fetch(["doc-7"]).values()
        assert np.allclose(vector, expected("text 7", salt=salt), atol=1e-6)
        sink.close()


def test_what_changes_meanwhile_is_counted_as_stale_and_followed_by_the_same_command(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_sdk.cli.commands._corpus_status", lambda: show)
    columns, job = Columns(id="id", keep=("text",)), JobOptions(lane="bulk")
    texts = {f"doc-{n}": f"text {n}" for n in range(100)}

    def serve_now(**options: Any) -> None:
        source = a_table(tmp_path / "in.parquet", list(texts.values()), id=list(texts))
        asyncio.run(run(source, store.old, two_models(), columns=columns, job=job, **options))

    def counted(target: str, *more: str) -> Figures:
        done = invoked(status, "--corpus", target, "--json", *more)
        assert done.exit_code == 0, done.output
        return msgspec.json.decode(done.stdout, type=Figures)

    serve_now()
    command = ("--of", store.old, "--to", store.new, "--model", "new")
    assert invoked(reembed, *command).exit_code == 0
    texts |= {"doc-3": "changed", "more": "more"}
    del texts["doc-9"]
    serve_now(only_changed=True, delete_missing=True)

    found = counted(store.new, "--from", store.old)
    assert (found.rows, found.current, found.changed, found.missing, found.gone) == (100, 98, 1, 1, 1)
    assert (found.stored, found.stored_current, found.version) == (100, 100, NEW)
    assert invoked(reembed, *command).exit_code == 0
    found = counted(store.new, "--from", store.old)
    assert (found.coverage, found.stale, found.gone, found.stored) == (1.0, 0, 0, 100)
    assert counted(store.old).version == OLD

    opened_sink(store.old).manifest.unlink()  # as where a standing sink filled the store
    found = counted(store.old)
    assert (found.recorded, found.rows, found.coverage, found.version) == (False, 100, 1.0, OLD)
    absent = invoked(status, "--corpus", f"{store.old}x")
    assert absent.exit_code == 1, absent.output
    assert "refuses" not in absent.output


def test_a_column_of_vectors_stands_beside_the_old_one_in_the_readers_own_table(
    tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application's own table, whose texts are where their vectors are to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedq_sdk.cli.commands._corpus_status", lambda: show)
    address, mark = postgres.get_uri(), uuid.uuid4().hex[:8]
    table, view = f"articles_{mark}", f"docs_{mark}"
    old, new = f"{address}#{table}:embedding", f"{address}#{table}:second"
    with psycopg.connect(address, autocommit=True) as owner:

        def ask(query: str) -> list[Any]:
            return owner.execute(query.replace("articles", table).replace("docs", view).encode()).fetchall()

        owner.execute(f"create table {table} (nr bigint primary key, body text, title text)".encode())
        owner.execute(
            f"insert into {table} select n, 'text ' || n, 't' from generate_series(0, 99) n".encode()
        )
        columns = Columns(text="body", id="nr")
        asyncio.run(run(f"{address}#{table}", old, two_models(), columns=columns, check=10))
        invoked(switch, view, "--to", old)
        assert ask("select count(vector), min(model_version), max(title) from docs") == [(100, OLD, "t")]

        command = ("--of", old, "--text-column", "body", "--id-column", "nr", "--to", new, "--model", "new")
        done = invoked(reembed, *command, "--check", "10", "--switch", view)
        assert done.exit_code == 0, done.output
        assert "in the store: 100 vectors, 100 of them of this version\n" in done.output
        assert ask("select count(vector), min(model_version), max(title) from docs") == [(100, NEW, "t")]
        assert ask("select count(embedding), min(embedding_model_version) from articles") == [(100, OLD)]

        owner.execute(f"delete from {table} where nr = 1".encode())
        owner.execute(f"update {table} set body = 'changed' where nr = 2".encode())
        done = invoked(status, "--corpus", new, "--from", old, "--json")
        found = msgspec.json.decode(done.stdout, type=Figures)
        assert (found.rows, found.changed, found.gone, found.stored) == (99, 1, 1, 99)
        assert invoked(reembed, *command).exit_code == 0
        [(vector,)] = ask("select second::text from articles where nr = 2")
        assert np.allclose(np.fromstring(vector[1:-1], sep=","), expected("changed", salt=NEW), atol=1e-6)
        assert invoked(switch, view, "--to", old).exit_code == 0
        assert ask("select min(model_version) from docs") == [(OLD,)]


def test_rights_to_a_view_stay_where_vectors_become_shorter(
    tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view whose columns are others has to be made anew, and its readers are not its owner."""
    monkeypatch.chdir(tmp_path)
    address, mark = postgres.get_uri(), uuid.uuid4().hex[:8]
    old, new = f"{address}#old_{mark}", f"{address}#new_{mark}"
    source = a_table(tmp_path / "in.parquet", ["one"], id=["a"])
    asyncio.run(run(source, old, columns=Columns(id="id")))
    job = JobOptions(lane="bulk", dimensions=32)
    asyncio.run(run(source, new, columns=Columns(id="id"), job=job))
    view, role = f"docs_{mark}", f"reader_{mark}"
    invoked(switch, view, "--to", old)
    with psycopg.connect(address, autocommit=True) as owner:
        owner.execute(f"create role {role}".encode())
        owner.execute(f"grant select on {view} to {role}".encode())

    assert invoked(switch, view, "--to", new).exit_code == 0

    with psycopg.connect(address, autocommit=True) as reader:
        reader.execute(f"set role {role}".encode())
        (row,) = reader.execute(f"select vector_dims(vector) from {view}".encode()).fetchall()
        assert row == (32,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(f"select 1 from new_{mark}".encode())


def test_a_query_that_does_not_end_keeps_a_switch_from_nobody_else(
    tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch waits for those that have the view, and those that come meanwhile wait for it: but not for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedq_batch.sinks.postgresql._VIEW_WAIT_MS", 50)
    monkeypatch.setattr("embedq_batch.sinks.postgresql._VIEW_TRIES", 2)
    address, mark = postgres.get_uri(), uuid.uuid4().hex[:8]
    source = a_table(tmp_path / "in.parquet", ["one"], id=["a"])
    for name in ("old", "new"):
        asyncio.run(run(source, f"{address}#{name}_{mark}", columns=Columns(id="id")))
    view = f"docs_{mark}"
    invoked(switch, view, "--to", f"{address}#old_{mark}")
    with psycopg.connect(address) as busy:
        busy.execute(f"select * from {view}".encode())  # its transaction goes on

        done = invoked(switch, view, "--to", f"{address}#new_{mark}")

        assert done.exit_code == 1
        assert "queries that do not end keep it" in done.output
        with psycopg.connect(address) as other:
            assert other.execute(f"select count(*) from {view}".encode()).fetchone() == (1,)
    done = invoked(switch, view, "--to", f"{address}#new_{mark}")
    assert (done.exit_code, f"it was old_{mark}" in done.output) == (0, True)
