"""What is done for many rows at once is what is done for each of them alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_batch import Columns, Problem, RowBatch
from embedq_batch.content import columns as columns_module
from embedq_batch.content.columns import BAD_ID, RowReader
from embedq_batch.content.rows import content_hash
from embedq_batch.manifest.plan import Done
from embedq_batch.manifest.store import Manifest, Written
from embedq_batch.running.reading import _JOB_BYTES, job_rows
from embedq_sdk.job_options import MAX_JOB_BYTES

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ids = st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
)


def one_by_one(columns: Columns, kind: type[str | int], batch: pa.RecordBatch) -> RowBatch:
    with (
        mock.patch.object(RowReader, "_whole_texts", return_value=None),
        mock.patch.object(columns_module, "_whole_ids", return_value=None),
    ):
        return RowReader(columns, kind).of_arrow(batch)


@given(
    st.lists(st.tuples(texts | st.none(), texts | st.none(), st.integers(0, 9)), max_size=6),
    st.sampled_from([pa.string(), pa.large_string()]),
    st.sampled_from([None, "{a}", "{{{a}}}: {b}{a}"]),
    st.sampled_from([None, "a", "n"]),
)
def test_rows_of_a_table_are_read_at_once_as_they_are_one_by_one(
    rows: list[Any], kind: pa.DataType, template: str | None, id: str | None
) -> None:
    batch = pa.record_batch(
        [
            pa.array([a for a, _, _ in rows], kind),
            pa.array([b for _, b, _ in rows], pa.string()),
            pa.array([n for _, _, n in rows], pa.int32()),
        ],
        ["a", "b", "n"],
    )
    columns = Columns(text="a" if template is None else None, template=template, id=id, keep=("b",))
    ids_are: type[str | int] = str if id == "a" else int

    at_once = RowReader(columns, ids_are).of_arrow(batch)
    alone = one_by_one(columns, ids_are, batch)

    assert (at_once.ids, at_once.texts, at_once.kept) == (alone.ids, alone.texts, alone.kept)
    assert all(type(each) in (int, str) for each in at_once.ids)
    hashes = at_once.hashes()
    kept = [(b,) for _, b, _ in rows]
    assert hashes == [content_hash(text, each) for text, each in zip(at_once.texts, kept, strict=True)]
    assert at_once.only(range(1, len(rows))).hashes() == hashes[1:]


def test_a_template_that_makes_a_text_too_long_is_a_problem_of_its_row() -> None:
    long = "x" * (MAX_JOB_BYTES // 2)
    batch = pa.record_batch([pa.array(["a", long]), pa.array(["b", long])], ["a", "b"])

    rows = RowReader(Columns(template="{a}-{b}"), int).of_arrow(batch)

    assert rows.texts[0] == "a-b"
    assert isinstance(rows.texts[1], Problem)
    assert rows.texts[1].code == "text_too_long"


@pytest.mark.parametrize("bad", ["nu\0l", "lone \ud800"])
def test_an_id_that_not_every_target_can_have_is_a_problem_of_its_row(bad: str) -> None:
    reader = RowReader(Columns(id="id"), str)
    rows = reader.of_records([{"id": "good", "text": "a"}, {"id": bad, "text": "b"}], None)

    assert rows.ids == ["good", "row 1"]
    assert rows.texts == ["a", BAD_ID]


@given(
    st.lists(st.none() | st.integers(0, 3 * _JOB_BYTES // 2), max_size=12), st.integers(1, 5), st.booleans()
)
def test_jobs_have_all_rows_once_and_are_no_larger_than_they_may_be(
    sizes: list[int | None], most: int, some: bool
) -> None:
    texts: list[str | Problem] = [
        Problem("missing_text", "") if size is None else "é" * (size // 2) for size in sizes
    ]
    batch = RowBatch(ids=list(range(len(sizes))), texts=texts)
    rows = list(range(0, len(sizes), 2)) if some else range(len(sizes))

    jobs = [list(job) for job in job_rows(batch, rows, most)]

    assert [n for job in jobs for n in job] == list(rows)
    for job in jobs:
        assert 1 <= len(job) <= most
        bytes_of = [len(text.encode()) for n in job if isinstance(text := texts[n], str)]
        assert len(job) == 1 or sum(bytes_of) <= _JOB_BYTES


parts = st.lists(
    st.tuples(
        st.lists(ids, min_size=1, max_size=5),
        st.sampled_from(["v1", "v2"]),
        st.none() | st.integers(1, 3),
        st.integers(0, 2),
    ),
    max_size=5,
)


@given(parts, st.lists(ids, max_size=3))
def test_the_manifest_knows_what_was_written_last_of_each_row_and_where_it_is(
    tmp_path_factory: pytest.TempPathFactory, written: list[Any], others: list[Any]
) -> None:
    known: dict[Any, Done] = {}
    places: dict[Any, tuple[int, int, int]] = {}
    with Manifest(tmp_path_factory.mktemp("manifest") / "manifest.sqlite") as manifest:
        for part, (rows, version, count, start) in enumerate(written, 1):
            hashes = [content_hash(f"{part} {id}", ()) for id in rows]
            counts = None if count is None else [count + n % 2 for n in range(len(rows))]
            manifest.wrote(
                Written(ids=rows, hashes=hashes, version=version, counts=counts, part=part, start=start), part
            )
            for n, id in enumerate(rows):
                each = 1 if counts is None else counts[n]
                known[id] = Done(hashes[n], version, part, each)
                places[id] = (part, start + (n if counts is None else sum(counts[:n])), each)
        asked = [*known, *others]
        gone = others[:1]
        assert manifest.known(asked) == ({id: known[id] for id in asked if id in known}, {})
        manifest.forget(gone)
        for id in gone:
            known.pop(id, None)
            places.pop(id, None)

        assert manifest.known(asked) == ({id: known[id] for id in asked if id in known}, {})
        sizes: dict[int, int] = {}
        for part, _, count in places.values():
            sizes[part] = sizes.get(part, 0) + count
        assert manifest.parts() == sizes
        for part in sizes:
            assert manifest.in_part(part) == sorted(
                (start, count) for where, start, count in places.values() if where == part
            )
        assert manifest.figures().done == len(known)
        manifest.begin_seeing()
        seen = list(known)[::2]
        manifest.saw(seen)
        assert set(next(manifest.missing(), [])) == known.keys() - set(seen)
