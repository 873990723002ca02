"""The file of mappings: what it may say, and what an error names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.shapes import BadMappings, parse_mappings, read_mappings
from embedq_consumer.shapes.mapping import Column
from embedq_consumer.shapes.mapping_file import _MappingPart, _OutputPart
from embedq_shared.topics import Topics
from tests.helpers.shapes import file_of, mapping, mappings_of

TOPICS = Topics("t")


def test_a_mapping_is_found_by_its_topics_and_by_its_name() -> None:
    found = mappings_of(docs={"topics": ["a", "b"]}, events={"shape": "cloudevents"})
    assert found.topics == ("a", "b")
    assert found.outputs == ("docs.vectors", "events.vectors")
    assert found.of_topic("a") is found.named("docs")
    assert found.of_topic("events") is None
    assert found.named("events") is not None


def test_columns_are_a_list_or_names_for_paths_or_all() -> None:
    assert mapping(columns=["title", "author.name"]).columns == (
        Column("title", "title"),
        Column("author_name", "author.name"),
    )
    assert mapping(columns={"by": "author.name"}).columns == (Column("by", "author.name"),)
    assert mapping(columns="*").columns is None
    assert mapping().columns == ()


def test_options_are_those_of_a_job() -> None:
    found = mapping(options={"dimensions": 64, "input_type": "document", "truncate": "end"})
    assert (found.job.dimensions, found.job.input_type, found.says_truncated) == (64, "document", True)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ({"text": None}, "mappings.docs.text: expected the field that is the text"),
        ({"text": "{a"}, "mappings.docs.text: expected {field}, got a single brace"),
        ({"shape": "xml"}, "mappings.docs.shape: invalid enum value 'xml'"),
        ({"txet": "a"}, "mappings.docs: object contains unknown field `txet`"),
        (
            {"topics": ["t.jobs"]},
            "mappings.docs.topics: expected topics of your own, got t.jobs; a record on a job topic names",
        ),
        ({"topics": ["__consumer_offsets"]}, "expected topics of your own"),
        ({"topics": ["a b"]}, "mappings.docs.topics: expected names of topics, got 'a b'"),
        (
            {"output": {"topic": "t.control"}},
            "mappings.docs.output.topic: expected a topic for results, got t.control",
        ),
        ({"topics": ["x"], "output": {"topic": "x"}}, "expected a topic that no mapping reads, got x"),
        ({"options": {"dimensions": 8}}, "mappings.docs.options: `dimensions`: expected an integer from 32"),
        ({"options": {"dimension": 64}}, "mappings.docs.options: unknown field `dimension`"),
        (
            {"options": {"dtype": "int8"}},
            "mappings.docs.options.dtype: expected no such option: flat results hold float32",
        ),
        ({"options": {"chunk": {"mode": "late"}}}, "options.chunk.mode: expected mean"),
        ({"columns": ["vector"]}, "output: expected each name once, got 'vector' 2 times"),
        ({"output": {"names": {"embedding": "v"}}}, "output.names.embedding: expected one of id, vector"),
        ({"types": {"price": "double"}}, "types.price: expected one of the columns"),
        ({"output": {"format": "avro", "nest": "payload"}}, "output.nest: expected nothing with format avro"),
        ({"columns": "*", "output": {"format": "protobuf"}}, "columns: expected a list with format protobuf"),
        ({"shape": "openai-batch", "text": "a"}, "text: expected nothing with shape openai-batch"),
        (
            {"shape": "openai-batch", "output": {"format": "avro"}},
            "output: expected a topic and nothing else",
        ),
    ],
)
def test_what_cannot_be_is_named_by_its_place(part: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BadMappings, match=re.escape(wrong)) as caught:
        mapping(**part)
    assert str(caught.value).startswith("embedq.yaml: ")


def test_no_two_mappings_read_one_topic() -> None:
    with pytest.raises(BadMappings, match="a topic that one mapping reads, got x twice"):
        mappings_of(one={"topics": ["x"]}, two={"topics": ["x"]})


def test_a_result_never_goes_where_another_mapping_would_read_it() -> None:
    with pytest.raises(BadMappings, match="expected a topic that no mapping reads, got x"):
        mappings_of(one={"topics": ["x"]}, two={"output": {"topic": "x"}})


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (b"", "expected `object`, got `null`"),
        (b"mappings: {}", "mappings: expected at least one"),
        (b"mappings:\n  a: [", "expected YAML, broken at line"),
        (b"\xff", "expected YAML"),
        (b"mappings:\n  a: {output: {}}", "mappings.a.output: object missing required field `topic`"),
    ],
)
def test_a_broken_file_says_where(source: bytes, wrong: str) -> None:
    with pytest.raises(BadMappings, match=re.escape(wrong)):
        parse_mappings(source, TOPICS, "f")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadMappings, match="expected a file that can be read"):
        read_mappings(tmp_path / "none.yaml", TOPICS)


def test_json_is_yaml_too(tmp_path: Path) -> None:
    path = tmp_path / "embedq.json"
    path.write_text('{"mappings": {"a": {"text": "t", "output": {"topic": "o"}}}}')
    assert read_mappings(path, TOPICS).names == ("a",)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_other_file_is_an_error_of_one_kind(source: bytes) -> None:
    with pytest.raises(BadMappings):
        parse_mappings(source, TOPICS, "f")


def test_the_pages_examples_are_mappings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "shapes.md").read_text()
    whole, part = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert parse_mappings(whole.encode(), TOPICS, "f").topics == ("shop.public.articles",)
    found = parse_mappings(b"mappings:\n" + part.encode(), TOPICS, "f").named("batch")
    assert found is not None
    assert found.options == {"model": "default"}


def test_the_pages_table_has_every_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "shapes.md").read_text()
    table = set(re.findall(r"^\| `([a-z_.]+)` \|", page, re.MULTILINE))
    keys = {field for field in _MappingPart.__struct_fields__ if field != "output"}
    assert table == keys | {f"output.{field}" for field in _OutputPart.__struct_fields__}


def test_the_file_of_this_test_is_well() -> None:
    assert b"output" in file_of(docs={})
