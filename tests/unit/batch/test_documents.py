"""Documents of topics, in the shapes that connectors write them in."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_batch.content.documents import Document, document
from embedq_batch.content.rows import Problem


def as_json(value: Any) -> bytes:
    return msgspec.json.encode(value)


ROW = {"id": 7, "text": "seven"}
SCHEMA = {"type": "struct", "fields": [], "optional": False}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"7", ROW),
        (None, ROW),
        (as_json({"id": 7}), {"text": "seven", "id": 7}),
        (as_json({"schema": SCHEMA, "payload": {"id": 7}}), {"schema": SCHEMA, "payload": ROW}),
        (as_json({"id": 7}), {"before": None, "after": ROW, "source": {}, "op": "c", "ts_ms": 1}),
        (as_json({"id": 7}), {"before": ROW, "after": ROW, "source": {}, "op": "u"}),
        (as_json({"id": 7}), {"schema": SCHEMA, "payload": {"before": None, "after": ROW, "op": "r"}}),
    ],
    ids=["row", "row without key", "key object", "connect", "debezium create", "update", "both"],
)
def test_a_document_is_found_in_every_envelope(key: bytes | None, value: Any) -> None:
    found = document(key, as_json(value), "id")

    assert found.id == "7"
    assert found.record == ROW


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"7", None),
        (as_json({"id": 7}), None),
        (as_json({"schema": SCHEMA, "payload": {"id": 7}}), None),
        (as_json({"key": 7}), None),
        (b"7", as_json(None)),
        (b"7", as_json({"schema": None, "payload": None})),
        (None, as_json({"before": ROW, "after": None, "op": "d"})),
        (None, as_json({**ROW, "__deleted": "true"})),
    ],
)
def test_a_delete_is_known_in_every_envelope(key: bytes | None, value: bytes | None) -> None:
    assert document(key, value, "id") == Document("7", None)


@pytest.mark.parametrize(
    ("value", "code"),
    [(b"{", "malformed"), (b"[1]", "malformed"), (b'{"a": "\xff"}', "malformed"), (b"text", "malformed")],
)
def test_what_is_no_document_is_a_problem_of_its_own(value: bytes, code: str) -> None:
    found = document(b"k", value, "id")

    assert found.id == "k"
    assert isinstance(found.record, Problem)
    assert found.record.code in (code, "invalid_utf8")


@given(st.none() | st.binary(max_size=40), st.none() | st.binary(max_size=80))
def test_any_bytes_are_read_without_an_error(key: bytes | None, value: bytes | None) -> None:
    assert isinstance(document(key, value, "id"), Document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "schema", "payload", "before", "after", "op", "__deleted", "text"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)


@given(json_values, json_values)
def test_any_json_is_read_without_an_error(key: Any, value: Any) -> None:
    found = document(as_json(key), as_json(value), "id")

    assert found.id is None or isinstance(found.id, str)
    assert found.record is None or isinstance(found.record, (dict, Problem))
