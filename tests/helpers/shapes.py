"""Mappings and records of other shapes, each made in one line."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2, wrappers_pb2

from embedq_consumer.shapes import (
    Mapping,
    Mappings,
    Message,
    NoRegistry,
    RegistryOptions,
    SchemaRegistry,
    Schemas,
    Unknown,
    connect,
    parse_mappings,
    read,
)
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


class Learning:
    """A registry's client side as admission uses it: what is unknown is learned, and asked for again."""

    def __init__(self, url: str) -> None:
        self.said: list[str | None] = []
        self.registry = SchemaRegistry(connect(RegistryOptions(url=url)), self.said.append)

    async def is_waiting(self) -> bool:
        return bool(self.said)

    async def reading(self, *args: Any, **more: Any) -> Any:
        while isinstance(found := reading(*args, schemas=self.registry, **more), Unknown):
            await self.registry.learn(found.want)
        return found


def message_class() -> Any:
    """A message with what Protobuf can hold: a nested one as the second of its file."""
    file = descriptor_pb2.FileDescriptorProto(name="article.proto", package="shop", syntax="proto3")
    file.dependency.extend(["google/protobuf/timestamp.proto", "google/protobuf/wrappers.proto"])
    file.enum_type.add(name="Kind").value.add(name="NONE", number=0)
    file.enum_type[0].value.add(name="NEWS", number=1)
    file.message_type.add(name="Unused")
    article = file.message_type.add(name="Article")
    kinds = {"id": 3, "text": 9, "price": 1, "blob": 12}
    for number, (name, kind) in enumerate(kinds.items(), 1):
        article.field.add(name=name, number=number, type=kind, label=1)
    article.field.add(name="at", number=5, type=11, label=1, type_name=".google.protobuf.Timestamp")
    article.field.add(name="note", number=6, type=11, label=1, type_name=".google.protobuf.StringValue")
    article.field.add(name="kind", number=7, type=14, label=1, type_name=".shop.Kind")
    article.field.add(name="tags", number=8, type=9, label=3)
    pool = descriptor_pool.DescriptorPool()
    for known in (timestamp_pb2, wrappers_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Article"))
