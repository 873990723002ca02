"""Mappings and records of other shapes, each made in one line."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml

from embedq_consumer.shapes import Mapping, Mappings, Message, NoRegistry, Schemas, parse_mappings, read
from embedq_consumer.shapes.reading import Reading
from embedq_shared.topics import Topics

NAME = "shop.articles-1-7"


def file_of(**mappings: dict[str, Any]) -> bytes:
    """A file of mappings; each says no more than it must."""
    parts = {}
    for name, part in mappings.items():
        part = {"text": "text", **part} if part.get("shape") != "openai-batch" else dict(part)
        part["output"] = {"topic": f"{name}.vectors", **part.get("output", {})}
        parts[name] = part
    return yaml.safe_dump({"mappings": parts}).encode()


def mappings_of(**mappings: dict[str, Any]) -> Mappings:
    return parse_mappings(file_of(**mappings), Topics("t"), "embedq.yaml")


def mapping(**part: Any) -> Mapping:
    """One mapping, called `docs`."""
    found = mappings_of(docs=part).named("docs")
    assert found is not None
    return found


def message(
    value: object = None, *headers: tuple[str, bytes | None], key: object = None, max_inputs: int = 2048
) -> Message:
    """A record; its key and value are JSON, unless they are bytes."""
    return Message(key=_bytes(key), value=_bytes(value), headers=headers, name=NAME, max_inputs=max_inputs)


def _bytes(given: object) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else msgspec.json.encode(given)


def reading(
    found: Mapping,
    value: object,
    *headers: tuple[str, bytes | None],
    schemas: Schemas | None = None,
    **more: Any,
) -> Reading:
    """What a record is by a mapping."""
    return read(found, message(value, *headers, **more), schemas or NoRegistry())
