"""What a record that is no job looks like, and the mapping that would read it: the end of the strict contract's errors. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from embedq_consumer.shapes.envelopes import is_structured
from embedq_consumer.shapes.mapping import Shape
from embedq_shared.topics import CONTENT_TYPE

_TEXTS: Final = ("text", "content", "body", "description", "title")
"""Columns that are usually the text."""
_CHANGE: Final = {"before", "after", "op"}
_EVENT: Final = {"specversion", "type", "source"}
_MOST_BYTES: Final = 1_000_000
"""A larger value is not read again for a hint."""
_WHERE: Final = "the setting `EMBEDQ_MAPPINGS`, docs/shapes.md"


def hint(
    value: bytes | None, headers: Sequence[tuple[str, bytes | None]], *, unknown_field: bool = False
) -> str:
    """The end of an error's sentence, "" where nothing is recognized. Never raises, and repeats nothing of the record.

    `unknown_field`: the error is about a field that jobs do not have.
    """
    if value is None:
        return _said("a deleted row (a tombstone)", "row")
    if value[:1] == b"\x00" and len(value) > 5:
        return _said("Schema Registry's wire format", "row")
    content_type = next((its or b"" for name, its in headers if name.lower() == CONTENT_TYPE), b"")
    if is_structured(content_type.lower().decode("latin-1")) or any(
        name == "ce_specversion" for name, _ in headers
    ):
        return _said("a CloudEvent", "cloudevents")
    try:
        found = msgspec.json.decode(value) if len(value) <= _MOST_BYTES else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return _of_object(found, unknown_field=unknown_field) if isinstance(found, dict) else ""


def _of_object(found: dict[str, Any], *, unknown_field: bool) -> str:
    names = found.keys()
    inner = found.get("payload")
    if names == {"schema", "payload"}:
        if isinstance(inner, dict) and inner.keys() >= _CHANGE:
            return _said("a change event of Debezium", "debezium")
        return _said("a row in Kafka Connect's envelope", "connect")
    if names >= _CHANGE:
        return _said("a change event of Debezium", "debezium")
    if names >= _EVENT:
        return _said("a CloudEvent", "cloudevents")
    if names >= {"custom_id", "body"}:
        return _said("a line of an OpenAI batch", "openai-batch")
    if "input" not in names and (text := next((name for name in _TEXTS if name in names), None)):
        return _said("a row of a table", "row", text)
    if "input" in names and unknown_field:
        return f"; to let further columns travel on, put them into `metadata`, or set a mapping ({_WHERE})"
    return ""


def _said(what: str, shape: Shape, text: str = "") -> str:
    more = f" and `text: {text}`" if text else ""
    return f"; this looks like {what}: set a mapping with `shape: {shape}`{more} ({_WHERE})"
