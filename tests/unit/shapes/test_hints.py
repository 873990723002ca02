"""What the strict contract's errors say of records that a mapping would read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.intake.admission import Rejection
from embedq_consumer.shapes import hint
from tests.helpers.in_flight import MODELS, NOW_MS, PARTITIONS, record, rules

CHANGE: dict[str, Any] = {"before": None, "after": {}, "op": "c"}


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"id": "1", "text": "hello"}, "shape: row` and `text: text`"),
        ({"title": "x"}, "shape: row` and `text: title`"),
        ({"schema": {}, "payload": {"text": "t"}}, "shape: connect`"),
        ({"schema": {}, "payload": CHANGE}, "shape: debezium`"),
        (CHANGE, "shape: debezium`"),
        ({"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, "shape: cloudevents`"),
        ({"custom_id": "1", "body": {}}, "shape: openai-batch`"),
        (b"\x00\x00\x00\x00\x01abc", "Schema Registry's wire format"),
        (None, "a tombstone"),
        ({"input": "t", "price": 1}, "put them into `metadata`, or set a mapping"),
    ],
)
def test_an_error_names_the_mapping_that_would_help(value: object, shape: str) -> None:
    given = value if value is None or isinstance(value, bytes) else msgspec.json.encode(value)
    found = rules().admit(msgspec.structs.replace(record(b""), value=given), MODELS, NOW_MS, PARTITIONS.get)
    assert isinstance(found, Rejection)
    assert shape in found.error.message
    assert "EMBEDQ_MAPPINGS" in found.error.message


def test_a_structured_event_is_recognized_by_its_content_type() -> None:
    one = record(b"{}", ("content-type", b"application/cloudevents+json"))
    found = rules().admit(one, MODELS, NOW_MS, PARTITIONS.get)
    assert isinstance(found, Rejection)
    assert found.error.code == "unsupported_content_type"
    assert "shape: cloudevents" in found.error.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": [1, 2]}, "`input[0]`: expected a string, got token ids"),
        ({"input": [[1, 2], [3]]}, "check_embedding_ctx_length=False"),
        ({"input": "t", "model": "text-embedding-3-small"}, "OpenAI's model names mean nothing here"),
    ],
)
def test_what_openais_clients_send_has_an_error_that_says_what_to_do(
    fields: dict[str, Any], said: str
) -> None:
    found = rules().admit(record(**fields), MODELS, NOW_MS, PARTITIONS.get)
    assert isinstance(found, Rejection)
    assert said in found.error.message


def test_another_kind_of_error_says_nothing_of_mappings() -> None:
    found = rules().admit(record(input="t", dimensions=8), MODELS, NOW_MS, PARTITIONS.get)
    assert isinstance(found, Rejection)
    assert "mapping" not in found.error.message


@given(
    st.none() | st.binary(max_size=64),
    st.lists(st.tuples(st.text(max_size=12), st.none() | st.binary(max_size=8)), max_size=3),
)
def test_no_record_is_too_odd_for_a_hint(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    assert isinstance(hint(value, headers), str)
