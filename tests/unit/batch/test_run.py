"""Runs from file to file with a fake service: every row once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedq_batch import Columns, VectorBatch
from embedq_batch.command import run as run_command
from embedq_batch.content.rows import RowBatch, RowId
from embedq_batch.errors import BadTarget, ModelChanged, OtherRun, RowsRefused, TargetAway, TooManyFailures
from embedq_batch.manifest.place import MANIFEST
from embedq_batch.manifest.store import glance
from embedq_batch.sinks.finals import ParquetFile
from embedq_batch.sinks.parts import PartsSink
from embedq_batch.sources.parquet import ParquetSource
from embedq_batch.sources.source import Since
from embedq_sdk import InvalidArgument, UnknownModel, UnknownModelVersion, late
from embedq_sdk.job_options import JobOptions
from embedq_shared.messages import Datum, ErrorBody
from tests.helpers.batch_runs import TEXTS as TEXTS_ALONE
from tests.helpers.batch_runs import a_table, assert_vectors, invoked, run, vectors_in
from tests.helpers.fake_service import NEW, OLD, Answer, FakeService, Received, changed, expected
from tests.helpers.support import wait_until

TEXTS = [f"text {n}" for n in range(500)]
ALL = dict(enumerate(TEXTS))


class Killed(BaseException):
    """Stands for a kill: nothing of the run may act on it but by ending."""


class Brittle(PartsSink):
    """A file target that ends the run, in the middle or after its work, and loses what it has not flushed."""

    def __init__(self, path: Path, dies: Callable[[str], bool]) -> None:
        super().__init__(path, ParquetFile())
        self._dies = dies

    def write(self, batch: VectorBatch) -> int:
        if self._dies("write"):
            raise Killed
        return super().write(batch)

    def flush(self) -> int:
        if self._dies("before flush"):
            raise Killed
        part = super().flush()
        if self._dies("after flush"):
            raise Killed
        return part


# -- every row once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.npy"])
async def test_a_table_becomes_a_file(tmp_path: Path, name: str) -> None:
    source = a_table(tmp_path / "in.parquet", TEXTS, year=range(500))

    done = await run(source, str(tmp_path / name), columns=Columns(keep=("year",)), check=5)

    assert_vectors(tmp_path / name, ALL, OLD)
    assert (done.rows, done.embedded, done.failed, done.model_version) == (500, 500, 0, OLD)
    assert done.check is not None
    assert (done.check.rows, done.check.passed) == (5, True)
    if name == "out.parquet":
        table = pq.read_table(tmp_path / name)
        assert table.column("year").to_pylist() == list(range(500))
        assert set(table.column("model_version").to_pylist()) == {OLD}
        assert table.schema.field("vector").type == pa.list_(pa.float32(), 64)
    if name == "out.jsonl":
        line = msgspec.json.decode((tmp_path / name).read_bytes().splitlines()[7])
        assert (line["id"], line["year"], line["model_version"], line["tokens"]) == (7, 7, OLD, 2)


@pytest.mark.parametrize("seed", range(4))
async def test_a_run_that_is_killed_anywhere_goes_on_and_every_row_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 40)
    monkeypatch.setattr("embedq_batch.running.writing._FLUSH_ROWS", 80)
    source = a_table(tmp_path / "in.parquet", TEXTS)
    chance = random.Random(seed)
    service = FakeService()
    kills = 0
    for _ in range(200):
        sink = Brittle(tmp_path / "out.parquet", lambda where: chance.random() < 0.3)
        try:
            done = await run(source, sink, service, job_texts=16)
        except Killed:
            kills += 1
            continue
        break

    assert kills > 3
    assert (done.rows, done.embedded + done.skipped) == (500, 500)
    assert_vectors(tmp_path / "out.parquet", ALL, OLD)
    parts = list((tmp_path / "out.parquet.embedq").glob("part-*"))
    assert all(part.suffix == ".arrow" for part in parts)


async def test_the_same_run_again_does_nothing_and_says_so(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"
    await run(source, str(out))
    before = out.read_bytes()
    service = FakeService()

    done = await run(source, str(out), service)

    assert (done.embedded, done.skipped) == (0, 0)
    assert [job.texts for job in service.received] == [["embedq"]]
    assert out.read_bytes() == before


async def test_a_file_that_was_removed_is_made_anew_of_its_parts(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"
    await run(source, str(out))
    out.unlink()
    service = FakeService()

    await run(source, str(out), service)

    assert_vectors(out, ALL, OLD)
    assert len(service.received) == 1


async def test_a_file_that_no_run_made_is_not_overwritten(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"
    out.write_bytes(b"dear")

    with pytest.raises(BadTarget, match="--force"):
        await run(source, str(out))
    assert out.read_bytes() == b"dear"

    await run(source, str(out), force=True)
    assert_vectors(out, ALL, OLD)


async def test_another_job_does_not_go_on_with_a_manifest(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "out.parquet")
    await run(source, out)

    with pytest.raises(OtherRun, match="dimensions was None, is 32"):
        await run(source, out, job=JobOptions(lane="bulk", dimensions=32))

    await run(source, out, job=JobOptions(lane="bulk", dimensions=32), again=True)
    assert {len(vector) for vector in vectors_in(out).values()} == {32}


async def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 40)
    monkeypatch.setattr("embedq_batch.running.writing._FLUSH_ROWS", 40)
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"
    answered = 0

    def until_300(job: Received) -> list[Answer] | None:
        nonlocal answered
        answered += len(job.texts)
        return None if answered > 300 else [service.good(job)]

    service = FakeService(behave=until_300)
    task = asyncio.create_task(run(source, str(out), service, job_texts=10))
    manifest = tmp_path / "out.parquet.embedq" / MANIFEST

    async def some() -> bool:
        try:
            return (await asyncio.to_thread(glance, manifest))[2].done > 0
        except sqlite3.Error:
            return False

    await wait_until(some, what="rows that are written down")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    _, state, figures = await asyncio.to_thread(glance, manifest)
    assert not state.complete
    assert 0 < figures.done <= 300
    assert not out.exists()

    done = await run(source, str(out))
    assert done.skipped == figures.done
    assert_vectors(out, ALL, OLD)


# -- a model that changes ---------------------------------------------------------------------------------------------


def reloading(after: int) -> FakeService:
    """A service that serves NEW after so many jobs."""

    def behave(job: Received) -> list[Answer]:
        if len(service.received) > after:
            service.version = NEW
        return [service.good(job)]

    service = FakeService(behave=behave)
    return service


@pytest.mark.parametrize("policy", ["finish", "restart"])
async def test_a_reload_in_the_middle_leaves_one_model_in_the_end(tmp_path: Path, policy: str) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "out.parquet")
    service = reloading(after=20)

    done = await run(source, out, service, job_texts=10, on_model_change=policy, in_flight=20)

    assert done.model_version == NEW
    assert_vectors(out, ALL, NEW)
    sent = sum(len(job.texts) for job in service.received)
    assert sent > 600  # those that were done before are done again


async def test_a_reload_in_the_middle_stops_a_run_that_asks_for_that(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"

    with pytest.raises(ModelChanged, match="--on-model-change"):
        await run(source, str(out), reloading(after=20), job_texts=10, on_model_change="stop", in_flight=20)

    _, _, figures = await asyncio.to_thread(glance, tmp_path / "out.parquet.embedq" / MANIFEST)
    assert figures.versions.keys() == {OLD}
    assert 100 <= figures.done < 500
    assert not out.exists()
    with pytest.raises(ModelChanged):
        await run(source, str(out), FakeService(version=NEW), on_model_change="stop")
    await run(source, str(out), FakeService(version=NEW), on_model_change="finish")
    assert_vectors(out, ALL, NEW)


async def test_replicas_that_are_reloaded_one_by_one_leave_one_model(tmp_path: Path) -> None:
    """While a reload goes through the replicas, answers of both models come in any order."""
    source, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "out.parquet")
    chance = random.Random(1)

    def behave(job: Received) -> list[Answer]:
        share = (len(service.received) - 10) / 60
        service.version = NEW if chance.random() < share else OLD
        return [service.good(job)]

    service = FakeService(behave=behave)
    done = await run(source, out, service, job_texts=10)

    assert_vectors(out, ALL, done.model_version)


# -- rows that fail ---------------------------------------------------------------------------------------------------


def failing(bad: Callable[[str], bool], code: Any = "text_too_long") -> FakeService:
    """A service that answers such texts with an error."""

    def behave(job: Received) -> list[Answer]:
        good = service.good(job)
        bads = [bad(text) for text in job.texts]
        if all(bads):
            return [service.failure(job, ErrorBody.of(code, "expected less", "input"))]
        data = [
            Datum(index=n, embedding=None, error=ErrorBody.of(code, "expected less", f"input[{n}]"))
            if bads[n]
            else datum
            for n, datum in enumerate(good.data)
        ]
        return [changed(good, data=data)]

    service = FakeService(behave=behave)
    return service


async def test_rows_that_fail_are_kept_apart_and_tried_again_on_demand(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "out.parquet")
    errors = tmp_path / "errors.jsonl"
    bad = failing(lambda text: text in {"text 7", "text 300"})

    done = await run(source, out, bad, errors=errors)

    assert (done.rows, done.failed) == (498, 2)
    assert [msgspec.json.decode(line) for line in errors.read_bytes().splitlines()] == [
        {"id": id, "code": "text_too_long", "message": "expected less"} for id in (7, 300)
    ]
    assert_vectors(out, {id: text for id, text in ALL.items() if id not in (7, 300)}, OLD)

    good = FakeService()
    done = await run(source, out, good, errors=errors, retry_errors=True)

    assert (done.embedded, done.failed) == (2, 0)
    assert errors.read_bytes() == b""
    assert_vectors(out, ALL, OLD)


async def test_a_row_whose_error_may_heal_is_tried_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_batch.running.embedding._pause", lambda attempt: 0.0)
    source, out = a_table(tmp_path / "in.parquet", TEXTS[:20]), str(tmp_path / "out.parquet")
    seen: list[str] = []

    def bad(text: str) -> bool:
        if text == "text 3":
            seen.append(text)
            return len(seen) < 3
        return False

    done = await run(source, out, failing(bad, "internal"))

    assert (done.rows, done.failed) == (20, 0)
    assert_vectors(out, dict(enumerate(TEXTS[:20])), OLD)


async def test_a_run_stops_by_itself_when_too_many_rows_fail(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "out.parquet"
    bad = failing(lambda text: text.endswith("0"))

    with pytest.raises(TooManyFailures, match="the first: 0: text_too_long"):
        await run(source, str(out), bad)
    assert not out.exists()

    done = await run(source, str(out), bad, max_error_share=0.2)
    assert (done.rows, done.failed) == (450, 50)


async def test_rows_that_no_job_can_carry_fail_alone(tmp_path: Path) -> None:
    texts = pa.array([b"good", None, b"", b"x" * 2_000_000, b"bad \xff", b"also good"], pa.binary()).view(
        pa.string()
    )
    pq.write_table(pa.table({"text": texts, "id": ["a", "b", "c", "d", "e", None]}), tmp_path / "in.parquet")
    errors = tmp_path / "errors.jsonl"

    done = await run(
        str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), columns=Columns(id="id"), errors=errors
    )

    assert (done.rows, done.failed) == (2, 4)
    assert_vectors(tmp_path / "out.parquet", {"a": "good", "c": ""}, OLD)
    found = {each["id"]: each["code"] for each in map(msgspec.json.decode, errors.read_bytes().splitlines())}
    assert found == {"b": "missing_text", "d": "text_too_long", "e": "invalid_utf8", "row 5": "missing_id"}


async def test_two_rows_of_one_id_are_no_silent_loss(tmp_path: Path) -> None:
    source = a_table(tmp_path / "in.parquet", ["one", "two", "one", "three"], id=["a", "b", "a", "a"])
    errors = tmp_path / "errors.jsonl"

    done = await run(source, str(tmp_path / "out.parquet"), columns=Columns(id="id"), errors=errors)

    assert (done.rows, done.failed) == (2, 1)
    assert_vectors(tmp_path / "out.parquet", {"a": "one", "b": "two"}, OLD)
    assert b"duplicate_id" in errors.read_bytes()


async def test_an_alias_that_is_not_served_ends_the_run_at_once(tmp_path: Path) -> None:
    def unknown(job: Received) -> list[Answer]:
        return [FakeService.failure(job, ErrorBody.of("unknown_model", "no such alias", "model"))]

    with pytest.raises(UnknownModel):
        await run(
            a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "o.parquet"), FakeService(behave=unknown)
        )
    assert not (tmp_path / "o.parquet").exists()


async def test_a_run_that_asks_for_a_version_stops_where_another_one_answers_and_goes_on_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 40)
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "o.parquet"
    service = pinned(until=200)
    asked: dict[str, Any] = {
        "job": JobOptions(lane="bulk", model_version=OLD),
        "job_texts": 16,
        "in_flight": 32,
    }

    with pytest.raises(UnknownModelVersion):
        await run(source, str(out), service, **asked)
    assert not out.exists()
    _, _, stopped = await asyncio.to_thread(glance, tmp_path / "o.parquet.embedq" / MANIFEST)
    assert stopped.versions.keys() == {OLD}
    assert 0 < stopped.done < 500

    done = await run(source, str(out), pinned(), **asked)
    assert (done.rows, done.skipped, done.failed) == (500, stopped.done, 0)
    assert_vectors(out, ALL, OLD)

    # The version is not a part of the run: without it the same run takes whichever there is.
    done = await run(source, str(out), FakeService(version=NEW), only_changed=True)
    assert done.model_version == NEW
    assert_vectors(out, ALL, NEW)


def pinned(until: int = 1_000_000) -> FakeService:
    """A service that answers jobs which ask for its version, or for none; after so many texts its version is another one."""
    left = until

    def behave(job: Received) -> list[Answer]:
        nonlocal left
        left -= len(job.texts)
        service.version = OLD if left > 0 else NEW
        if job.job.model_version in (None, service.version):
            return [service.good(job)]
        return [
            FakeService.failure(job, ErrorBody.of("unknown_model_version", "it has another one", "model"))
        ]

    service = FakeService(behave=behave)
    return service


def test_the_command_takes_the_version_that_must_answer(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), tmp_path / "o.parquet"
    typed = ("--from", source, "--to", str(out), "--model-version")

    refused = invoked(run_command, *typed, NEW, service=pinned())
    done = invoked(run_command, *typed, OLD, service=pinned())

    assert (refused.exit_code, done.exit_code) == (1, 0)
    assert "unknown_model_version: it has another one" in refused.output
    assert_vectors(out, ALL, OLD)


class Topic(ParquetSource):
    """A source that is read from somewhere on; it notes from where."""

    def __init__(self, path: str, since: Since | None) -> None:
        super().__init__([path], TEXTS_ALONE)
        self.since = since
        self.begun: list[Since | None] = []

    def batches(self) -> Iterator[RowBatch]:
        self.begun.append(self.since)
        return super().batches()


@pytest.mark.parametrize("since", [None, 1_000, {0: 7, 1: 3}])
async def test_a_run_that_goes_on_begins_where_it_began_and_the_next_one_where_it_says(
    tmp_path: Path, since: Since | None
) -> None:
    table, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "o.jsonl")
    later = 5_000
    stopped = Topic(table, since)
    with pytest.raises(UnknownModelVersion):
        await run(stopped, out, pinned(until=200), job=JobOptions(lane="bulk", model_version=OLD))
    gone_on, next_one = Topic(table, later), Topic(table, later)

    await run(gone_on, out)
    await run(next_one, out, only_changed=True)

    assert (stopped.begun, gone_on.begun, next_one.begun) == ([since], [since], [later])


# -- a table that changes ---------------------------------------------------------------------------------------------


async def test_only_rows_that_changed_are_embedded_again(tmp_path: Path) -> None:
    path, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    ids = [f"r{n}" for n in range(100)]
    columns = Columns(id="id")
    a_table(path, TEXTS[:100], id=ids)
    await run(str(path), out, columns=columns)
    texts = dict(zip(ids, TEXTS[:100], strict=True)) | {"r3": "changed", "new": "new"}
    a_table(path, list(texts.values()), id=list(texts))
    service = FakeService()

    done = await run(str(path), out, service, columns=columns, only_changed=True)

    assert (done.embedded, done.skipped) == (2, 99)
    assert sorted(text for job in service.received for text in job.texts) == ["changed", "embedq", "new"]
    assert_vectors(out, texts, OLD)


async def test_rows_that_the_source_no_longer_has_are_deleted_on_demand(tmp_path: Path) -> None:
    path, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    columns = Columns(id="id")
    a_table(path, TEXTS[:100], id=range(100))
    await run(str(path), out, columns=columns)
    a_table(path, TEXTS[50:100], id=range(50, 100))

    done = await run(str(path), out, columns=columns, only_changed=True)
    assert (done.rows, done.deleted) == (100, 0)
    done = await run(str(path), out, columns=columns, only_changed=True, delete_missing=True)

    assert (done.rows, done.deleted, done.embedded) == (50, 50, 0)
    assert_vectors(out, {n: TEXTS[n] for n in range(50, 100)}, OLD)


async def test_rows_of_an_old_model_that_cannot_be_done_again_are_told(tmp_path: Path) -> None:
    path, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    columns = Columns(id="id")
    a_table(path, TEXTS[:100], id=range(100))
    await run(str(path), out, columns=columns)
    a_table(path, TEXTS[50:100], id=range(50, 100))

    with pytest.raises(BadTarget, match="50 rows that the source no longer has are of an older model"):
        await run(str(path), out, FakeService(version=NEW), columns=columns, only_changed=True)
    await run(
        str(path), out, FakeService(version=NEW), columns=columns, only_changed=True, delete_missing=True
    )

    assert_vectors(out, {n: TEXTS[n] for n in range(50, 100)}, NEW)


async def test_a_new_model_after_a_complete_run_does_all_rows_again(tmp_path: Path) -> None:
    source, out = a_table(tmp_path / "in.parquet", TEXTS), str(tmp_path / "out.parquet")
    await run(source, out)

    done = await run(source, out, FakeService(version=NEW), only_changed=True)

    assert (done.embedded, done.skipped) == (500, 0)
    assert_vectors(out, ALL, NEW)


# -- spans and numbers ------------------------------------------------------------------------------------------------


async def test_a_text_becomes_spans_and_those_of_a_shorter_one_are_fewer(tmp_path: Path) -> None:
    path, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    columns, job = Columns(id="id"), JobOptions(lane="bulk", chunk=late(10))
    a_table(path, ["a" * 25, "b" * 5], id=["x", "y"])
    await run(str(path), str(out), columns=columns, job=job)

    rows = pq.read_table(out).to_pylist()
    assert [(row["id"], row["row"], row["start"], row["end"]) for row in rows] == [
        ("x#0", "x", 0, 10),
        ("x#1", "x", 10, 20),
        ("x#2", "x", 20, 25),
        ("y#0", "y", 0, 5),
    ]
    assert np.array_equal(np.float32(rows[2]["vector"]), expected("a" * 5))

    a_table(path, ["c" * 12, "b" * 5], id=["x", "y"])
    await run(str(path), str(out), columns=columns, job=job, only_changed=True)
    assert sorted(row["id"] for row in pq.read_table(out).to_pylist()) == ["x#0", "x#1", "y#0"]


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.npy"])
async def test_vectors_are_what_was_asked_for(tmp_path: Path, name: str, dtype: Any) -> None:
    source = a_table(tmp_path / "in.parquet", TEXTS[:50])
    job = JobOptions(lane="bulk", dtype=dtype)
    if (name, dtype) == ("out.npy", "int8"):
        with pytest.raises(InvalidArgument, match="dtype"):
            await run(source, str(tmp_path / name), job=job)
        return

    done = await run(source, str(tmp_path / name), job=job, check=50)

    assert done.check is not None
    assert done.check.passed
    if name == "out.parquet":
        (kind,) = {"float16": [pa.float16()], "int8": [pa.int8()], "binary": [pa.uint8()]}[dtype]
        field = pq.read_schema(tmp_path / name).field("vector")
        assert field.type.value_type == kind
        assert field.type.list_size == (8 if dtype == "binary" else 64)


async def test_kept_columns_may_not_have_our_names(tmp_path: Path) -> None:
    source = a_table(tmp_path / "in.parquet", TEXTS, vector=TEXTS)

    with pytest.raises(InvalidArgument, match="vector"):
        await run(source, str(tmp_path / "out.parquet"), columns=Columns(keep=("vector",)))


# -- targets that fail ------------------------------------------------------------------------------------------------


class Refusing(PartsSink):
    """A target that is away now and then, and refuses some ids; it keeps what it takes in memory."""

    def __init__(self, path: Path, refused: Sequence[RowId], away: int) -> None:
        super().__init__(path, ParquetFile())
        self.rows: dict[RowId, Any] = {}
        self._refused = set(refused)
        self._away = away

    def write(self, batch: VectorBatch) -> int:
        if self._away:
            self._away -= 1
            raise TargetAway(target="a store", reason="it restarts")
        if self._refused & set(batch.ids):
            raise RowsRefused(target="a store", reason="too long")
        assert not self.rows.keys() & set(batch.ids)
        self.rows.update(zip(batch.ids, batch.vectors, strict=True))
        return super().write(batch)


async def test_rows_that_a_store_refuses_fail_alone_and_a_store_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_batch.running.threads.backoff", lambda *_, **__: 0.0)
    source = a_table(tmp_path / "in.parquet", TEXTS)
    refused = [3, 4, 77, 499]
    sink = Refusing(tmp_path / "out.parquet", refused, away=5)
    errors = tmp_path / "errors.jsonl"

    done = await run(source, sink, errors=errors)

    assert (done.rows, done.failed) == (496, 4)
    assert sink.rows.keys() == ALL.keys() - set(refused)
    assert [msgspec.json.decode(line)["message"] for line in errors.read_bytes().splitlines()] == [
        "too long"
    ] * 4


async def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Reading stops while the service does not answer: what is read and not answered is bounded."""
    source, out = a_table(tmp_path / "in.parquet", ["t"] * 20_000), str(tmp_path / "out.parquet")
    service = FakeService(behave=lambda job: [service.good(job)] if job.texts == ["embedq"] else None)
    task = asyncio.create_task(run(source, out, service, in_flight=256, job_texts=32))
    await wait_until(lambda: len(service.received) >= 9)
    for _ in range(1000):  # turns of the loop, in which nothing more may be read
        await asyncio.sleep(0)

    assert len(service.received) <= 1 + 256 // 32 + 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
