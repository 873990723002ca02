"""Rows out of files, whatever is in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedq_batch.command import beginning, run
from embedq_batch.content.columns import Columns
from embedq_batch.content.rows import BATCH_ROWS, Problem, RowBatch, rows_at_once
from embedq_batch.errors import BadSource
from embedq_batch.sources.jsonl import StandardInputSource
from embedq_batch.sources.kafka import offsets_from
from embedq_batch.sources.opening import opened_source
from embedq_batch.sources.source import Source
from embedq_sdk import InvalidArgument


def rows(source: Source) -> list[tuple[Any, Any, Any]]:
    """Each row's id, text or problem's code, and what is kept."""
    source.open()

    def of(batch: RowBatch) -> list[tuple[Any, Any, Any]]:
        texts = [text.code if isinstance(text, Problem) else text for text in batch.texts]
        kept = [None] * len(batch) if batch.kept is None else batch.kept.to_pylist()
        return list(zip(batch.ids, texts, kept, strict=True))

    found = [row for batch in source.batches() for row in of(batch)]
    assert [row for batch in source.batches() for row in of(batch)] == found, "a second pass reads the same"
    source.close()
    return found


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for n in range(3):
        pq.write_table(pa.table({"text": [f"{n}a", f"{n}b"]}), tmp_path / f"in{n}.parquet")
    source = opened_source([f"{tmp_path}/in*.parquet"], Columns())

    assert rows(source) == [(n, text, None) for n, text in enumerate(["0a", "0b", "1a", "1b", "2a", "2b"])]
    assert source.count() == 6


def test_files_of_other_columns_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in1.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "in2.parquet")

    with pytest.raises(BadSource, match=r"in2\.parquet: text: expected string"):
        opened_source([f"{tmp_path}/in*.parquet"], Columns()).open()


def test_columns_of_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(
        b'\xef\xbb\xbfkey,body,year\n01,"one, and\nmore",1999\n02,bad \xff,x\n03,,\n'
    )
    source = opened_source([str(tmp_path / "in.csv")], Columns(text="body", id="key", keep=("year",)))

    assert rows(source) == [
        ("01", "one, and\nmore", {"year": "1999"}),
        ("02", "invalid_utf8", {"year": "x"}),
        ("03", "", {"year": ""}),
    ]


def test_lines_of_json_are_rows_and_their_ids_keep_their_kind(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(
        b'{"id": 1, "text": "one", "n": 1}\n\n{"id": 2, "text": null}\n{"id": "x", "text": "three", "n": "no"}\nno json\n'
    )
    path = str(tmp_path / "in.jsonl")

    assert rows(opened_source([path], Columns(id="id"))) == [
        ("1", "one", None),
        ("2", "missing_text", None),
        ("x", "three", None),
        ("row 3", "malformed", None),
    ]
    (tmp_path / "in.jsonl").write_bytes(
        b'{"id": 1, "text": "one"}\n' * 1000 + b'{"id": "x", "text": "three"}\n'
    )
    assert rows(opened_source([path], Columns(id="id")))[-1] == ("row 1000", "invalid_id", None)


def test_a_kept_value_of_another_type_than_before_is_a_problem_of_its_row(tmp_path: Path) -> None:
    lines = b'{"text": "t", "n": 1}\n' * 1000 + b'{"text": "u", "n": "x"}\n{"text": "v", "n": 2}\n'
    (tmp_path / "in.jsonl").write_bytes(lines)
    found = rows(opened_source([str(tmp_path / "in.jsonl")], Columns(keep=("n",))))

    assert found[999:] == [(999, "t", {"n": 1}), (1000, "invalid_column", {"n": None}), (1001, "v", {"n": 2})]


def test_standard_input_is_read_once_and_may_be_passed_over_again() -> None:
    stream = io.BytesIO(b"".join(b'{"text": "t%d"}\n' % n for n in range(3000)))
    source = StandardInputSource(stream, Columns())

    assert rows(source) == [(n, f"t{n}", None) for n in range(3000)]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"title": "T", "body": "B"}, "T {B}: B"),
        ({"title": "T", "body": None}, "T {}: "),
        ({"title": None, "body": None}, "missing_text"),
        ({"title": 7, "body": "B"}, "7 {B}: B"),
        ({"title": "T", "body": ["x"]}, "invalid_text"),
    ],
)
def test_a_template_makes_one_text_of_several_columns(
    tmp_path: Path, record: dict[str, Any], text: str
) -> None:
    import msgspec

    (tmp_path / "in.jsonl").write_bytes(msgspec.json.encode(record) + b"\n")
    source = opened_source([str(tmp_path / "in.jsonl")], Columns(template="{title} {{{body}}}: {body}"))

    assert rows(source) == [(0, text, None)]


@pytest.mark.parametrize("template", ["{", "{}", "no column", "{a!r}", "{a:>5}"])
def test_a_template_that_cannot_be_meant_is_refused(template: str) -> None:
    with pytest.raises(InvalidArgument, match="template"):
        Columns(template=template)


@pytest.mark.parametrize("places", [[], ["a.parquet", "b.csv"], ["x.xlsx"], ["postgresql://me:secret@h/db"]])
def test_a_source_that_is_not_known_is_refused_without_its_password(places: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="`from`: expected") as refused:
        opened_source(places, Columns())
    assert "secret" not in str(refused.value)


def test_a_topic_is_begun_at_the_offsets_that_are_given() -> None:
    starts, ends = {0: 5, 1: 0, 2: 3}, {0: 10, 1: 0, 2: 9}

    assert offsets_from({0: 7, 2: 9}, starts, ends, "kafka:t") == {0: 7, 1: 0, 2: 9}
    for wanted, said in (
        ({0: 4}, "partition 0: offset 4: its log has 5 to 10"),
        ({1: 1}, "partition 1: offset 1: its log has 0 to 0"),
        ({3: 0}, "partition 3: expected 0 to 2"),
    ):
        with pytest.raises(BadSource, match=said):
            offsets_from(wanted, starts, ends, "kafka:t")


@pytest.mark.parametrize(
    ("typed", "since"),
    [
        ("0:1200", {0: 1200}),
        ("0:1200,11:0", {0: 1200, 11: 0}),
        ("1970-01-01T00:00:01+00:00", 1000),
        (None, None),
    ],
)
def test_where_a_topic_begins_is_typed_as_a_time_or_as_offsets(typed: str | None, since: Any) -> None:
    assert beginning(click.Context(run), run.params[0], typed) == since


def test_offsets_are_for_one_topic() -> None:
    with pytest.raises(InvalidArgument, match="expected a time for jobs, got offsets"):
        opened_source(["jobs"], Columns(), since={0: 1})


@pytest.mark.parametrize("name", ["in.parquet", "in.jsonl", "-"])
def test_long_rows_are_read_fewer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A thousand books at once would not fit into memory."""
    monkeypatch.setattr("embedq_batch.content.rows.BATCH_BYTES", 5000)
    monkeypatch.setattr("embedq_batch.sources.jsonl.BATCH_BYTES", 5000)
    texts = [f"{n:02} {'x' * 1000}" for n in range(50)]
    lines = b"".join(msgspec.json.encode({"text": text}) + b"\n" for text in texts)
    pq.write_table(pa.table({"text": texts, "long": ["y" * 9000] * 50}), tmp_path / "in.parquet")
    (tmp_path / "in.jsonl").write_bytes(lines)
    source = (
        StandardInputSource(io.BytesIO(lines), Columns())
        if name == "-"
        else opened_source([str(tmp_path / name)], Columns())
    )
    source.open()

    batches = list(source.batches())

    assert [text for batch in batches for text in batch.texts] == texts
    assert 2 <= max(map(len, batches)) <= 5
    source.close()


def test_how_many_rows_are_read_at_once_goes_by_how_long_they_are() -> None:
    assert rows_at_once(64, 64 * 100) == BATCH_ROWS
    assert rows_at_once(64, 64 << 20) == 32
    assert rows_at_once(1, 1 << 40) == 1
    assert rows_at_once(64, 0) == BATCH_ROWS


def test_any_number_of_blank_lines_is_passed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' + b"\n" * 5000 + b'{"text": "b"}\n')

    assert rows(opened_source([f"{tmp_path}/in.jsonl"], Columns())) == [(0, "a", None), (1, "b", None)]
