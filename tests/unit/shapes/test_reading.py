"""The 11 shapes that the ecosystem writes, and what each becomes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping as Map
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.shapes import BadLine, BadRow, Embeddable, FlatAnswer, Mapping, Removal
from tests.helpers.shapes import NAME, mapping, reading

EVENT = {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": "article"}
HEADERS = [(f"ce_{name}", value.encode()) for name, value in EVENT.items()]
CONNECT = {
    "type": "struct",
    "optional": False,
    "fields": [
        {"field": "id", "type": "int64", "optional": False},
        {"field": "text", "type": "string", "optional": True},
        {
            "field": "at",
            "type": "int64",
            "optional": True,
            "name": "org.apache.kafka.connect.data.Timestamp",
            "version": 1,
        },
    ],
}


def change(op: str, before: Any = None, after: Any = None) -> dict[str, Any]:
    return {"before": before, "after": after, "op": op, "source": {"table": "articles"}, "ts_ms": 1}


def row(found: object) -> tuple[Any, Any, dict[str, Any]]:
    """The text, the id and the columns of a row."""
    assert isinstance(found, Embeddable)
    assert isinstance(found.answer, FlatAnswer)
    return found.job.input, found.answer.id, {column.name: column.value for column in found.answer.columns}


def refused(one: Mapping, value: object, *headers: tuple[str, bytes | None], **more: Any) -> BadRow:
    with pytest.raises(BadRow) as caught:
        reading(one, value, *headers, **more)
    return caught.value


# -- plain rows --------------------------------------------------------------------------------------------------------


def test_a_row_has_a_text_an_id_and_columns_that_travel_on() -> None:
    one = mapping(id="id", columns=["price", "tags"])
    assert row(reading(one, {"id": 1, "text": "hello", "price": 3, "tags": ["a"], "left": "out"})) == (
        "hello",
        1,
        {"price": 3, "tags": ["a"]},
    )


def test_all_columns_travel_on_but_the_id_which_is_there_already() -> None:
    found = row(reading(mapping(id="id", columns="*"), {"id": "a", "text": "t", "x": None}))
    assert found == ("t", "a", {"text": "t", "x": None})


def test_a_column_that_the_row_lacks_is_null() -> None:
    assert row(reading(mapping(columns=["x"]), {"text": "t"}))[2] == {"x": None}


def test_a_row_without_an_id_has_its_key_and_without_a_key_its_place() -> None:
    assert row(reading(mapping(), {"text": "t"}, key=b"k-1"))[1] == "k-1"
    assert row(reading(mapping(), {"text": "t"}))[1] == NAME


def test_a_row_in_messagepack_is_a_row() -> None:
    one = mapping(id="id", columns=["blob"])
    found = reading(
        one,
        msgspec.msgpack.encode({"id": 1, "text": "t", "blob": b"\x00"}),
        ("Content-Type", b"application/msgpack"),
    )
    assert row(found)[2] == {"blob": b"\x00"}


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ({"id": 1}, "text", "`text`: expected a field of this name"),
        ({"id": 1, "text": None}, "text", "`text`: expected a text, got null"),
        ({"id": 1, "text": ["a"]}, "text", "`text`: expected a string, a number or a boolean"),
        ({"text": "t"}, "id", "`id`: expected a field of this name, the mapping's id"),
        ({"id": None, "text": "t"}, "id", "`id`: expected an integer or a string"),
        ({"id": 1.5, "text": "t"}, "id", "`id`: expected an integer or a string"),
        ({"id": True, "text": "t"}, "id", "`id`: expected an integer or a string"),
        ({"id": "", "text": "t"}, "id", "`id`: expected an integer or a string"),
        ({"id": "x" * 257, "text": "t"}, "id", "`id`: expected an integer or a string"),
        ([1], None, "the value: expected an object"),
        (b"{", None, "the value: expected valid JSON"),
        (b"", None, "the value: expected valid JSON"),
    ],
)
def test_a_bad_row_names_the_field(value: object, param: str | None, said: str) -> None:
    bad = refused(mapping(id="id"), value)
    assert str(bad).startswith(said)
    assert bad.param == param


def test_a_bad_row_has_its_id_where_that_can_be_read() -> None:
    assert refused(mapping(id="id"), {"id": 7, "text": None}).id == "7"


def test_a_text_that_is_null_may_delete_the_result() -> None:
    found = reading(mapping(id="id", null_text="delete"), {"id": 7, "text": None})
    assert isinstance(found, Removal)
    assert found.key == b"7"


def test_options_are_the_jobs() -> None:
    found = reading(mapping(options={"dimensions": 64, "truncate": "end"}), {"text": "t"})
    assert isinstance(found, Embeddable)
    assert (found.job.dimensions, found.job.truncate) == (64, "end")


def test_a_column_may_not_take_the_place_of_the_results_own() -> None:
    bad = refused(mapping(columns="*"), {"text": "t", "vector": 1})
    assert bad.param == "vector"
    assert (
        row(reading(mapping(columns="*", output={"nest": "payload"}), {"text": "t", "vector": 1}))[2][
            "vector"
        ]
        == 1
    )
    named = mapping(columns="*", output={"names": {"vector": "embedding"}})
    assert row(reading(named, {"text": "t", "vector": 1}))[2]["vector"] == 1


# -- Connect's envelope ------------------------------------------------------------------------------------------------


def test_connects_envelope_is_taken_off_and_its_types_stay() -> None:
    one = mapping(shape="connect", id="id", columns=["at"], output={"format": "connect"})
    found = reading(one, {"schema": CONNECT, "payload": {"id": 1, "text": "t", "at": 1700000000000}})
    assert row(found) == ("t", 1, {"at": 1700000000000})
    assert isinstance(found, Embeddable)
    assert isinstance(found.answer, FlatAnswer)
    assert found.answer.columns[0].schema["name"] == "org.apache.kafka.connect.data.Timestamp"


def test_an_envelope_without_a_payload_is_a_deleted_row() -> None:
    one = mapping(shape="connect", id="id")
    assert isinstance(reading(one, {"schema": CONNECT, "payload": None}, key=b"1"), Removal)


def test_what_is_in_no_envelope_is_refused_by_its_name() -> None:
    assert "an object with `schema` and `payload`" in str(refused(mapping(shape="connect"), {"text": "t"}))


# -- Debezium ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["c", "u", "r"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_create_an_update_and_a_snapshot_are_rows(op: str, wrapped: bool) -> None:
    event: dict[str, Any] = change(op, after={"id": 1, "text": "t", "n": 2})
    value = (
        {"schema": {"type": "struct", "fields": [{**CONNECT, "field": "after"}]}, "payload": event}
        if wrapped
        else event
    )
    assert row(reading(mapping(shape="debezium", id="id", columns=["n"]), value)) == ("t", 1, {"n": 2})


def test_a_delete_is_a_tombstone_under_the_id_that_the_row_had() -> None:
    one = mapping(shape="debezium", id="id")
    assert reading(one, change("d", before={"id": 5, "text": None}), key={"id": 5}) == Removal(one, "5", b"5")
    assert reading(one, change("d"), key={"id": 5}) == Removal(one, "5", b"5")
    assert reading(one, None, key={"schema": {}, "payload": {"id": 5}}) == Removal(one, "5", b"5")


def test_a_document_of_mongodb_is_json_inside() -> None:
    one = mapping(shape="debezium", id="_id")
    assert row(reading(one, change("c", after=json.dumps({"_id": "a", "text": "t"}))))[:2] == ("t", "a")
    assert refused(one, change("c", after="{")).param == "after"


@pytest.mark.parametrize(
    ("event", "param"),
    [
        (change("t"), "op"),
        (change("m"), "op"),
        ({"after": {}}, "op"),
        (change("c"), "after"),
        (change("u", after=[1]), "after"),
    ],
)
def test_other_events_are_refused(event: object, param: str) -> None:
    assert refused(mapping(shape="debezium"), event).param == param


def test_a_row_that_debeziums_unwrapping_marks_as_deleted_is() -> None:
    found = reading(mapping(id="id"), {"id": 1, "text": None, "__deleted": "true"})
    assert isinstance(found, Removal)
    assert row(reading(mapping(id="id"), {"id": 1, "text": "t", "__deleted": "false"}))[0] == "t"


# -- tombstones and keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "id"),
    [
        (b"5", b"5"),
        (b"row-5", b"row-5"),
        (b'"row-5"', b"row-5"),
        (b'{"id": 5}', b"5"),
        (b'{"article_id": 5}', b"5"),
        (b'{"schema": {}, "payload": {"id": 5}}', b"5"),
        (b'{"schema": {}, "payload": 5}', b"5"),
        (b"05", b"05"),
        (b"1.5", b"1.5"),
        (b"true", b"true"),
    ],
)
def test_a_tombstone_deletes_the_result_of_the_id_in_its_key(key: bytes, id: bytes) -> None:
    found = reading(mapping(id="id"), None, key=key)
    assert isinstance(found, Removal)
    assert found.key == id


def test_a_result_and_its_tombstone_may_have_the_sources_own_key() -> None:
    one = mapping(id="id", output={"key": "source"})
    found = reading(one, {"id": 5, "text": "t"}, key={"id": 5})
    assert isinstance(found, Embeddable)
    gone = reading(one, None, key={"id": 5})
    assert isinstance(gone, Removal)
    assert found.answer.key == gone.key == b'{"id":5}'
    assert refused(one, {"id": 5, "text": "t"}).param == "key"


@pytest.mark.parametrize("key", [None, b"\xff", b'{"a": 1, "b": 2}', b'{"id": null}', b""])
def test_a_tombstone_without_an_id_is_refused(key: bytes | None) -> None:
    assert refused(mapping(id="id"), None, key=key).param == "key"


def test_a_mapping_may_refuse_deleted_rows() -> None:
    assert "a deleted one" in str(refused(mapping(deletes=False), None, key=b"1"))


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(min_size=1, max_size=256)))
def test_a_row_and_its_tombstone_always_have_the_same_key(id: int | str) -> None:
    """Whatever an id looks like: as a serializer of JSON writes a key, alone or in an object."""
    one = mapping(id="id")
    made = reading(one, {"id": id, "text": "t"})
    assert isinstance(made, Embeddable)
    for key in (id, {"id": id}, {"schema": None, "payload": {"id": id}}):
        gone = reading(one, None, key=key)
        assert isinstance(gone, Removal)
        assert gone.key == made.answer.key


# -- CloudEvents -------------------------------------------------------------------------------------------------------


def test_an_event_in_binary_mode_has_its_attributes_in_headers() -> None:
    one = mapping(shape="cloudevents", columns=["price", "ce_type"])
    assert row(reading(one, {"text": "t", "price": 1}, *HEADERS)) == (
        "t",
        "e-1",
        {"price": 1, "ce_type": "article"},
    )


def test_an_event_in_structured_mode_is_its_value() -> None:
    one = mapping(shape="cloudevents", id="ce_subject", columns=["ce_source"])
    value = EVENT | {"subject": "a-1", "data": {"text": "t"}}
    content_type = ("content-type", b"application/cloudevents+json; charset=UTF-8")
    assert row(reading(one, value, content_type)) == ("t", "a-1", {"ce_source": "/shop"})


def test_an_events_data_may_be_text_alone_or_base64() -> None:
    one = mapping(shape="cloudevents", text="data")
    assert row(reading(one, b"a text", ("content-type", b"text/plain"), *HEADERS))[0] == "a text"
    inside = EVENT | {"data": "a text", "datacontenttype": "text/plain"}
    assert row(reading(one, inside))[0] == "a text"
    encoded = EVENT | {"data_base64": base64.b64encode(b"a text").decode(), "datacontenttype": "text/plain"}
    assert row(reading(one, encoded))[0] == "a text"


@pytest.mark.parametrize(
    ("value", "headers", "param"),
    [
        ({"text": "t"}, [], "specversion"),
        (EVENT | {"specversion": "0.3", "data": {}}, [], "specversion"),
        ({"specversion": "1.0", "id": "1", "type": "x", "data": {}}, [], "source"),
        (b"x", [("content-type", b"image/png"), *HEADERS], "datacontenttype"),
        (b"x", [("content-type", b"application/cloudevents+avro")], None),
        (EVENT | {"data_base64": "?"}, [], "data_base64"),
        ({"text": "t"}, [("ce_specversion", b"1.0"), ("ce_id", b"\xff")], "ce_id"),
        (None, HEADERS, "text"),
    ],
)
def test_what_is_no_event_that_can_be_read_is_refused(
    value: object, headers: list[tuple[str, bytes]], param: str | None
) -> None:
    bad = refused(mapping(shape="cloudevents"), value, *headers)
    assert bad.param == param


# -- OpenAI batches ----------------------------------------------------------------------------------------------------


def line(**changes: Any) -> dict[str, Any]:
    body = {"input": ["a", "b"], "model": "default", "dimensions": 64}
    return {"custom_id": "r-1", "method": "POST", "url": "/v1/embeddings", "body": body} | changes


def test_a_batch_line_is_a_job_by_its_custom_id() -> None:
    found = reading(mapping(shape="openai-batch"), line())
    assert isinstance(found, Embeddable)
    assert (found.job.id, found.job.input, found.job.dimensions) == ("r-1", ["a", "b"], 64)


def test_a_mapping_may_put_the_alias_in_place_of_openais_model_names() -> None:
    one = mapping(shape="openai-batch", options={"model": "default"})
    found = reading(one, line(body={"input": "a", "model": "text-embedding-3-small"}))
    assert isinstance(found, Embeddable)
    assert found.job.model == "default"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"body": None}, "invalid_value", "body"),
        ({"url": "/v1/chat/completions"}, "invalid_value", "url"),
        ({"method": "GET"}, "invalid_value", "method"),
        ({"extra": 1}, "unknown_field", "extra"),
        ({"body": {"input": [[1, 2]]}}, "invalid_value", "input[0]"),
        ({"body": {"input": "a", "inptu": 1}}, "unknown_field", "inptu"),
        ({"body": {"input": ["x"] * 3000}}, "too_many_inputs", "input"),
    ],
)
def test_a_bad_batch_line_is_answered_under_its_custom_id(
    changes: Map[str, Any], code: str, param: str
) -> None:
    found = reading(mapping(shape="openai-batch"), line(**changes))
    assert isinstance(found, BadLine)
    assert (found.bad.error.code, found.bad.error.param, found.answer.custom_id) == (code, param, "r-1")


@pytest.mark.parametrize("value", [{"body": {}}, line(custom_id=3), line(custom_id=""), [1], b"{", None])
def test_a_line_without_a_custom_id_cannot_be_answered(value: object) -> None:
    refused(mapping(shape="openai-batch"), value)


# -- whatever comes ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PARTS: list[dict[str, Any]] = [
    {"columns": "*"},
    {"shape": "connect", "columns": "*", "output": {"format": "connect"}},
    {"shape": "debezium", "id": "id"},
    {"shape": "cloudevents", "columns": "*"},
    {"shape": "openai-batch"},
]
MAPPINGS = [mapping(**part) for part in PARTS]


@given(st.sampled_from(MAPPINGS), JSON, st.none() | JSON)
def test_any_json_is_read_or_refused(one: Mapping, value: object, key: object) -> None:
    try:
        reading(one, value, key=key)
    except BadRow as bad:
        assert len(str(bad)) < 400  # noqa: PT017


@given(st.dictionaries(st.sampled_from(["a", "b", "price", "Ω"]), JSON, max_size=4))
def test_columns_of_a_plain_row_come_out_equal(columns: dict[str, Any]) -> None:
    found = reading(mapping(columns="*"), columns | {"text": "t"})
    assert isinstance(found, Embeddable)
    assert isinstance(found.answer, FlatAnswer)
    value = json.loads(found.answer.value(b"", "v", truncated=False))
    assert {name: value[name] for name in columns} == json.loads(json.dumps(columns))
