"""What a store has after records of a followed topic were taken, without a broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_batch import Columns, VectorBatch
from embedq_batch.content.columns import fitted
from embedq_batch.content.inference import following as types_of
from embedq_batch.content.rows import Problem, RowId, Shape, VectorType
from embedq_batch.errors import DocumentRefused, RowsRefused
from embedq_batch.following.feeds import DocumentFeed, Feed, ResultFeed
from embedq_batch.following.follow import Following, FollowOptions
from embedq_batch.running.embedding import Embedder
from embedq_batch.running.progress import Progress
from embedq_batch.sink_command import sink
from embedq_sdk import InvalidArgument, UnknownModelVersion, late
from embedq_sdk.job_options import JobOptions
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_shared import topics as names
from embedq_shared.codec import CONTENT_TYPES
from embedq_shared.kafka import ConsumerRecord
from embedq_shared.messages import ErrorBody
from tests.helpers.batch_runs import fake_client, invoked
from tests.helpers.fake_service import NEW, OLD, FakeService, expected, reply_record

COLUMNS = Columns(id="id")
BULK = JobOptions(lane="bulk")
SPANS = JobOptions(lane="bulk", chunk=late(10))


class Table:
    """A store in memory. It refuses rows with these ids, and its columns have types where `typed` says so."""

    name = "a store"
    dtypes = frozenset[VectorType]({"float32"})

    def __init__(self, refused: Sequence[RowId] = (), *, typed: bool = True) -> None:
        self._typed = typed
        self.manifest = Path("unused")
        self.rows: dict[RowId, dict[str, Any]] = {}
        self.shape: Shape | None = None
        self._refused = set(refused)

    def open(self, shape: Shape, record: Any, *, force: bool) -> None:
        if self._typed and self.shape is not None:
            assert self.shape.kept == shape.kept
        self.shape = shape

    def kept_types(self, names: Sequence[str]) -> pa.Schema | None:
        return self.shape.kept if self._typed and self.shape is not None else None

    def write(self, batch: VectorBatch) -> int:
        assert len(set(batch.ids)) == len(batch)
        if self._refused & set(batch.rows or batch.ids):
            raise RowsRefused(target=self.name, reason="too long")
        for n, id in enumerate(batch.ids):
            place = None if batch.spans is None else tuple(batch.spans[n].tolist())
            row = id if batch.rows is None else batch.rows[n]
            kept = {} if batch.kept is None else batch.kept.slice(n, 1).to_pylist()[0]
            self.rows[id] = {"row": row, "place": place, "vector": batch.vectors[n], **kept}
        return 0

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        assert self.shape is not None
        assert not self.shape.spans
        for id in ids:
            self.rows.pop(id, None)

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        assert self.shape is not None
        assert self.shape.spans
        self.rows = {id: row for id, row in self.rows.items() if row["row"] not in rows or id in but}

    def finish(self, record: Any) -> None:
        raise AssertionError("a sink has no end")

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """With its first list pyarrow imports pandas where that is installed."""
    pa.array([0])


@asynccontextmanager
async def following(
    table: Table, feed: Feed, job: JobOptions = BULK, service: FakeService | None = None
) -> AsyncIterator[Following]:
    async with fake_client(service) as (client, _):
        yield Following(
            KafkaConnection.of("unused:9092", {}),
            feed,
            Embedder(client, job, lambda reason: None),
            table,
            FollowOptions(topic="t", group="g"),
            Progress(0.0),
        )


def a_record(key: str, value: bytes | None, headers: Sequence[Any] = ()) -> Any:
    offset = next(_offsets)
    return ConsumerRecord("t", 0, offset, 0, 0, key.encode(), value, None, 0, len(value or b""), headers)


_offsets = iter(range(1_000_000))


def a_document(id: str, text: str | None, **columns: Any) -> Any:
    return a_record(id, None if text is None else msgspec.json.encode({"id": id, "text": text, **columns}))


def a_result(id: str, texts: str | list[str], job: JobOptions = BULK, version: str = OLD) -> Any:
    """The record of a submitted job's result."""
    service = FakeService(version=version)
    kind = (names.CONTENT_TYPE, CONTENT_TYPES["msgpack"].encode())
    received = service.receive(job.encode(texts, id), [kind], "embed.jobs", 0, 0)
    value, headers = reply_record(received, service.answers(received)[0])
    return a_record(id, value, headers)


# -- late chunks -------------------------------------------------------------------------------------------------------------


async def test_a_document_has_a_vector_for_each_span_and_none_that_it_has_no_more() -> None:
    table = Table()
    async with following(table, DocumentFeed(COLUMNS), SPANS) as sink:
        await sink.take([a_document("x", "a" * 45), a_document("y", "b" * 5), a_document("z", "c" * 12)])
        assert table.rows.keys() == {*(f"x#{n}" for n in range(5)), "y#0", "z#0", "z#1"}
        assert table.rows["x#4"]["place"] == (40, 45)
        assert np.array_equal(table.rows["x#4"]["vector"], expected("a" * 5))

        await sink.take([a_document("x", "d" * 12), a_document("y", None)])
        assert table.rows.keys() == {"x#0", "x#1", "z#0", "z#1"}
        assert np.array_equal(table.rows["x#1"]["vector"], expected("dd"))

        await sink.take([a_document("z", "short"), a_document("z", None), a_document("x", "again")])
        assert table.rows.keys() == {"x#0"}


async def test_the_first_thing_that_a_topic_says_may_be_a_delete() -> None:
    table = Table()
    table.rows["x#0"] = {"row": "x"}
    async with following(table, DocumentFeed(COLUMNS), SPANS) as sink:
        await sink.take([a_document("x", None)])
    assert table.rows == {}


async def test_a_delete_beside_documents_that_all_fail_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    async def noted(self: Following, record: Any, problem: Problem) -> None:
        told.append(problem.code)

    monkeypatch.setattr(Following, "_refused", noted)
    table = Table()
    table.rows["x"] = {"row": "x"}
    async with following(table, DocumentFeed(COLUMNS)) as sink:
        await sink.take([a_document("x", None), a_record("y", b'{"id": "y"}')])
    assert (table.rows, told) == ({}, ["missing_text"])


async def test_results_with_spans_have_their_places_and_the_last_one_of_a_poll_counts() -> None:
    table = Table()
    async with following(table, ResultFeed(Columns())) as sink:
        await sink.take([a_result("one", "a" * 25, SPANS), a_result("two", ["b" * 12, "c" * 3], SPANS)])
        assert table.rows.keys() == {"one#0", "one#1", "one#2", "two#0#0", "two#0#1", "two#1#0"}
        assert (table.rows["two#0#1"]["row"], table.rows["two#0#1"]["place"]) == ("two#0", (10, 12))

        await sink.take([a_result("one", "d" * 30, SPANS), a_result("one", "e" * 12, SPANS)])
        assert table.rows.keys() == {"one#0", "one#1", "two#0#0", "two#0#1", "two#1#0"}
        assert np.array_equal(table.rows["one#1"]["vector"], expected("ee"))


async def test_a_store_for_spans_takes_no_results_without() -> None:
    async with following(Table(), ResultFeed(Columns())) as sink:
        await sink.take([a_result("one", "a" * 25, SPANS)])
        with pytest.raises(DocumentRefused, match="other_vectors"):
            await sink.take([a_result("two", "b")])


async def test_of_rows_with_several_vectors_those_that_the_store_refuses_are_told_alone() -> None:
    table = Table(refused=["y"])
    async with following(table, DocumentFeed(COLUMNS), SPANS) as sink:
        with pytest.raises(DocumentRefused, match="too long"):
            await sink.take([a_document(id, id * 25) for id in ("w", "x", "y", "z")])
    assert {row["row"] for row in table.rows.values()} >= {"w", "x"}
    assert len(table.rows) % 3 == 0


# -- columns that go along ---------------------------------------------------------------------------------------------------

KEPT = Columns(id="id", keep=("n", "tags"))


async def test_a_column_has_the_type_that_the_store_has_whatever_comes_first_after_a_restart() -> None:
    table = Table()
    async with following(table, DocumentFeed(KEPT)) as sink:
        await sink.take([a_document("a", "text", n=1.5, tags=["x"]), a_document("b", "text", n=2)])
    async with following(table, DocumentFeed(KEPT)) as sink:
        await sink.take([a_document("b", None)])  # says nothing of any column
        await sink.take([a_document("c", "text"), a_document("d", "text", n=3, tags=[])])
        with pytest.raises(DocumentRefused, match="invalid_column"):
            await sink.take([a_document("e", "text", n="three")])
    assert {id: (row["n"], row["tags"]) for id, row in table.rows.items()} == {
        "a": (1.5, ["x"]),
        "c": (None, None),
        "d": (3.0, []),
    }


async def test_a_store_without_types_takes_the_values_of_each_poll_as_they_come() -> None:
    table = Table(typed=False)
    async with following(table, DocumentFeed(KEPT)) as sink:
        await sink.take([a_document("a", "text")])
        await sink.take([a_document("b", "text", n=1)])
        await sink.take([a_document("c", "text", n="two")])
        with pytest.raises(DocumentRefused, match="invalid_column"):  # and not the topic's end
            await sink.take([a_document("d", "text", n=1), a_document("e", "text", n="x")])
    assert [table.rows[id]["n"] for id in ("a", "b", "c")] == [None, 1, "two"]


async def test_a_results_metadata_that_does_not_fit_is_told() -> None:
    async with following(Table(), ResultFeed(Columns(keep=("n",)))) as sink:
        await sink.take([a_result("one", "a", JobOptions(lane="bulk", metadata={"n": 1}))])
        with pytest.raises(DocumentRefused, match="invalid_column"):
            await sink.take([a_result("two", "b", JobOptions(lane="bulk", metadata={"n": "x"}))])


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
        )
    ),
    st.sampled_from(
        [None, pa.schema([("a", pa.int64())]), pa.schema([("a", pa.null()), ("b", pa.string())])]
    ),
)
def test_any_values_have_types_and_those_that_do_not_fit_are_told(
    records: list[dict[str, Any]], there: pa.Schema | None
) -> None:
    schema = types_of(records, ("a", "b"), there)
    texts: list[str | Problem] = [""] * len(records)

    batch = fitted([{name: record.get(name) for name in ("a", "b")} for record in records], schema, texts)

    assert schema.names == ["a", "b"]
    for record, text, row in zip(records, texts, batch.to_pylist(), strict=True):
        lost = any(record.get(name) is not None and row[name] is None for name in ("a", "b"))
        assert lost == isinstance(text, Problem)


# -- what ends the command ---------------------------------------------------------------------------------------------------


async def test_a_version_that_is_asked_for_is_the_only_one_in_the_store() -> None:
    def behave(job: Any) -> list[Any]:
        return [
            FakeService.failure(job, ErrorBody.of("unknown_model_version", "it has another one", "model"))
        ]

    table = Table()
    job = JobOptions(lane="bulk", model_version=NEW)
    async with following(table, DocumentFeed(COLUMNS), job, FakeService(behave=behave)) as sink:
        with pytest.raises(UnknownModelVersion):
            await sink.take([a_document(str(n), "text") for n in range(200)])

    async with following(table, ResultFeed(Columns(), NEW)) as sink:
        await sink.take([a_result("new", "a", version=NEW)])
        with pytest.raises(DocumentRefused, match="unknown_model_version"):
            await sink.take([a_result("old", "a", version=OLD)])
    assert table.rows.keys() == {"new"}


async def test_vectors_of_a_kind_that_the_store_does_not_keep_are_refused_before_the_first() -> None:
    async with following(Table(), DocumentFeed(COLUMNS), JobOptions(lane="bulk", dtype="binary")) as sink:
        with pytest.raises(InvalidArgument, match="float32 for a store"):
            await sink.take([a_document("x", "text")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "t", "--to", "out.parquet"), "expected a store"),
        (("--from", "t", "--to", "kafka:t"), "lancedb:"),
        (("--from", "results", "--to", "lancedb:here#docs", "--chunk", "mean"), "results have theirs"),
    ],
)
def test_what_is_no_standing_sink_is_said_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = invoked(sink, *arguments)

    assert done.exit_code == 2
    assert said in done.output
