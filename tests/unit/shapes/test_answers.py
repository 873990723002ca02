"""Flat results in each format, read back by other people's readers; and lines of batches."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import fastavro
import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.shapes import BadRow, BatchAnswer, Embeddable, FlatAnswer, Mapping
from embedq_consumer.shapes.columns import typed
from embedq_consumer.shapes.registry.schemas import Fetch, Given, ProtobufReader, Refused, Registration
from embedq_consumer.shapes.registry.wire_format import Framed, framed
from embedq_shared.messages import ErrorBody, Usage
from tests.helpers.shapes import mapping, reading

VECTOR = np.array([0.1, -2.5, 3.0], dtype="<f4")
VERSION = "sha256:" + "ab" * 32


class Numbered:
    """A registry that takes every schema, as number 42."""

    def __init__(self) -> None:
        self.taken: list[Registration] = []

    def reader(self, want: Fetch) -> Refused:
        return Refused("none")

    def number(self, want: Registration) -> int:
        self.taken.append(want)
        return 42


def answer(one: Mapping, value: object, **more: Any) -> FlatAnswer:
    found = reading(one, value, schemas=Numbered(), **more)
    assert isinstance(found, Embeddable)
    assert isinstance(found.answer, FlatAnswer)
    return found.answer


def written(one: Mapping, value: object, *, truncated: bool = False) -> bytes:
    return answer(one, value).value(VECTOR.tobytes(), VERSION, truncated=truncated)


ROW = {"id": 1, "text": "t", "title": "Tides", "price": 2.5, "left": None, "tags": ["a", "b"]}
COLUMNS = ["title", "price", "left", "tags"]


def test_a_plain_result_is_flat() -> None:
    found = json.loads(written(mapping(id="id", columns=COLUMNS), ROW))
    assert found == {
        "id": 1,
        "vector": [0.1, -2.5, 3.0],
        "model_version": VERSION,
        "title": "Tides",
        "price": 2.5,
        "left": None,
        "tags": ["a", "b"],
    }


def test_a_vectors_numbers_are_the_shortest_that_read_back_the_same() -> None:
    assert b"[0.1,-2.5,3.0]" in written(mapping(), ROW)


def test_names_constants_and_an_object_for_the_columns_make_what_qdrants_sink_takes() -> None:
    one = mapping(
        id="id",
        columns=["title"],
        output={
            "nest": "payload",
            "constants": {"collection_name": "docs"},
            "names": {"model_version": "version"},
        },
    )
    assert json.loads(written(one, ROW)) == {
        "collection_name": "docs",
        "id": 1,
        "vector": [0.1, -2.5, 3.0],
        "version": VERSION,
        "payload": {"title": "Tides"},
    }


@pytest.mark.parametrize("format", ["json", "connect"])
def test_a_vector_may_be_text_or_bytes_for_columns_that_hold_no_lists(format: str) -> None:
    def vector(form: str) -> Any:
        found = json.loads(written(mapping(output={"vector": form, "format": format}), ROW))
        return (found if format == "json" else found["payload"])["vector"]

    assert json.loads(vector("text")) == [0.1, -2.5, 3.0]
    assert base64.b64decode(vector("base64")) == VECTOR.tobytes()


def test_a_text_that_may_be_cut_says_whether_it_was() -> None:
    one = mapping(options={"truncate": "end"}, output={"names": {"truncated": "cut"}})
    assert json.loads(written(one, ROW, truncated=True))["cut"] is True
    assert json.loads(written(one, ROW))["cut"] is False
    assert "truncated" not in json.loads(written(mapping(), ROW))


def test_with_connects_schema_each_field_has_its_type() -> None:
    found = json.loads(written(mapping(id="id", columns=COLUMNS, output={"format": "connect"}), ROW))
    fields = {field["field"]: field for field in found["schema"]["fields"]}
    assert set(fields) == set(found["payload"])
    assert fields["id"] == {"field": "id", "type": "int64", "optional": False}
    assert fields["vector"]["items"] == {"type": "float", "optional": False}
    assert [fields[name]["type"] for name in COLUMNS] == ["string", "double", "string", "string"]
    assert json.loads(found["payload"]["tags"]) == ["a", "b"], "what has no type of its own is JSON text"


def test_declared_types_hold_whatever_the_values_are() -> None:
    one = mapping(columns=["n", "o"], types={"n": "double", "o": "json"}, output={"format": "connect"})
    whole = json.loads(written(one, {"text": "t", "n": 3, "o": {"a": 1}}))
    broken = json.loads(written(one, {"text": "t", "n": 3.5, "o": None}))
    assert whole["schema"] == broken["schema"]
    assert (whole["payload"]["n"], whole["payload"]["o"]) == (3.0, '{"a":1}')


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("int32", 2**31),
        ("int64", 2**63),
        ("int64", 1.5),
        ("string", 1),
        ("boolean", 1),
        ("double", True),
        ("double", "1"),
    ],
)
def test_a_value_that_is_not_of_its_declared_type_is_named(declared: str, value: object) -> None:
    one = mapping(columns=["n"], types={"n": declared})
    with pytest.raises(BadRow, match="`n`: expected") as caught:
        answer(one, {"text": "t", "n": value})
    assert caught.value.param == "n"


def registered(found: FlatAnswer) -> Registration:
    assert found.registered is not None
    return found.registered[0]


def payload(data: bytes) -> bytes:
    found = framed(data, {}, "")
    assert found is not None
    assert found.schema == 42
    return found.payload


def test_avro_is_read_back_by_its_schema() -> None:
    one = mapping(id="id", columns=COLUMNS, options={"truncate": "end"}, output={"format": "avro"})
    found = answer(one, ROW)
    registration = registered(found)
    assert (registration.subject, registration.kind) == ("docs.vectors-value", "AVRO")
    data = payload(found.value(VECTOR.tobytes(), VERSION, truncated=True))
    record = fastavro.schemaless_reader(io.BytesIO(data), json.loads(registration.text), None)
    assert isinstance(record, dict)
    assert record.pop("vector") == VECTOR.tolist()
    assert record == {
        "id": 1,
        "model_version": VERSION,
        "truncated": True,
        "title": "Tides",
        "price": 2.5,
        "left": None,
        "tags": '["a","b"]',
    }


def test_json_schema_describes_what_is_written() -> None:
    one = mapping(id="id", columns=COLUMNS, output={"format": "json-schema"})
    found = answer(one, ROW)
    data = json.loads(payload(found.value(VECTOR.tobytes(), VERSION, truncated=False)))
    jsonschema.validate(data, json.loads(registered(found).text))
    assert (data["id"], data["title"], data["vector"]) == (1, "Tides", [0.1, -2.5, 3.0])


def test_protobuf_is_read_back_by_its_schema() -> None:
    one = mapping(id="id", columns=COLUMNS, output={"format": "protobuf", "vector": "base64"})
    found = answer(one, ROW)
    data = payload(found.value(VECTOR.tobytes(), VERSION, truncated=False))
    reader = ProtobufReader(Given(kind="PROTOBUF", text=registered(found).text))
    assert reader.read(Framed(42, data)).value == {
        "id": 1,
        "model_version": VERSION,
        "title": "Tides",
        "price": 2.5,
        "left": None,
        "tags": '["a","b"]',
        "vector": VECTOR.tobytes(),
    }


@pytest.mark.parametrize("format", ["avro", "protobuf"])
def test_a_columns_name_that_the_format_does_not_take_is_named(format: str) -> None:
    one = mapping(columns=["price-eur"], output={"format": format})
    with pytest.raises(
        BadRow, match=f"`price-eur`: expected a name of letters, digits and underscores in {format}"
    ):
        answer(one, {"text": "t", "price-eur": 1})
    assert answer(
        mapping(columns={"price": "price-eur"}, output={"format": format}), {"text": "t", "price-eur": 1}
    )


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = SCALARS | st.text(max_size=12) | st.lists(st.integers(0, 9), max_size=3)


@given(
    st.sampled_from(["json", "connect", "avro", "json-schema", "protobuf"]),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
)
def test_no_result_is_larger_than_its_size_says(
    format: str, columns: dict[str, Any], numbers: list[float]
) -> None:
    one = mapping(columns=["a", "b", "c"], output={"format": format})
    found = answer(one, columns | {"text": "t"})
    vector = np.array(numbers, dtype="<f4").tobytes()
    assert len(found.value(vector, VERSION, truncated=True)) <= found.size + 16 * len(numbers) + 16


@given(VALUES)
def test_a_column_without_a_schema_has_a_type_that_its_value_is_of(value: Any) -> None:
    found = typed("a", value, None, None, nested=False)
    again = typed("a", found.value, found.schema, None, nested=False)
    assert (again.schema, again.value) == (found.schema, found.value)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_line_answers_as_openai_does() -> None:
    one = BatchAnswer(mapping=mapping(shape="openai-batch"), custom_id="r-1", name="b-0-7")
    datum = msgspec.Raw(b'{"object":"embedding","index":0,"embedding":[0.5]}')
    found = json.loads(one.value([datum], "default", VERSION, Usage(3, 3)))
    assert (found["custom_id"], found["error"]) == ("r-1", None)
    assert found["response"]["status_code"] == 200
    body = found["response"]["body"]
    assert (body["object"], body["data"][0]["embedding"], body["usage"]["total_tokens"]) == ("list", [0.5], 3)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("invalid_value", 400, "invalid_request_error"),
        ("unknown_model", 404, "invalid_request_error"),
        ("unknown_model_version", 404, "invalid_request_error"),
        ("internal", 500, "server_error"),
    ],
)
def test_a_failed_line_has_an_error_and_its_status(code: Any, status: int, kind: str) -> None:
    one = BatchAnswer(mapping=mapping(shape="openai-batch"), custom_id="r-1", name="b-0-7")
    found = json.loads(one.failure(ErrorBody.of(code, "said", "input")))
    assert found["response"]["status_code"] == status
    assert found["response"]["body"]["error"] == {
        "message": "said",
        "type": kind,
        "param": "input",
        "code": code,
    }
