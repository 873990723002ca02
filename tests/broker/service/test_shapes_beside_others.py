"""Mapped records beside other people's programs: a real Kafka Connect on both sides, and a real Schema Registry."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from embedq_consumer.shapes import BadRow, FlatAnswer
from embedq_consumer.shapes.registry.wire_format import framed
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.java_programs import connect, schema_registry
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, replicas
from tests.helpers.shapes import Learning, mapping, message_class
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ARTICLE: dict[str, Any] = {
    "type": "record",
    "name": "Article",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "text", "type": "string"},
        {"name": "price", "type": "double"},
    ],
}


# -- Kafka Connect -----------------------------------------------------------------------------------------------------


@pytest.mark.kafka
async def test_lines_of_a_file_become_flat_results_in_another_one_by_connect_alone(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """Connect's file source, its JsonConverter with schemas and a transform; then the service; then Connect's file sink, which
    reads what JsonConverter makes of a flat result and of a tombstone."""
    prefix = fresh_prefix()
    lines, vectors = f"{prefix}-lines", f"{prefix}-vectors"
    topics: Topics = await make_topics(stack, prefix, partitions=1, names=[lines, vectors])
    part = {
        "topics": [lines],
        "shape": "connect",
        "text": "text",
        "columns": ["text", "from"],
        "options": {"dimensions": 32},
        "output": {"topic": vectors, "format": "connect"},
    }
    (tmp_path / "embedq.yaml").write_text(yaml.safe_dump({"mappings": {"lines": part}}))
    (tmp_path / "in.txt").write_text("The tide turns.\nIt turns again.\n")
    source = {
        "name": "lines",
        "connector.class": "org.apache.kafka.connect.file.FileStreamSourceConnector",
        "file": str(tmp_path / "in.txt"),
        "topic": lines,
        "transforms": "hoist,from",
        "transforms.hoist.type": "org.apache.kafka.connect.transforms.HoistField$Value",
        "transforms.hoist.field": "text",
        "transforms.from.type": "org.apache.kafka.connect.transforms.InsertField$Value",
        "transforms.from.static.field": "from",
        "transforms.from.static.value": "a file",
    }
    sink = {
        "name": "vectors",
        "connector.class": "org.apache.kafka.connect.file.FileStreamSinkConnector",
        "file": str(tmp_path / "out.txt"),
        "topics": vectors,
    }
    replica = Replica(
        stack, topics, models / "a", tmp_path / "log", redis=False, mappings=tmp_path / "embedq.yaml"
    )
    out = tmp_path / "out.txt"
    async with replicas(replica), connect(tmp_path, stack.kafka_servers, source, sink) as running:

        def stored(count: int) -> bool:
            assert running.poll() is None, (tmp_path / "connect.log").read_text()[-3000:]
            return out.exists() and len(out.read_text().splitlines()) >= count

        await wait_until(lambda: stored(2), within=120, what="two rows in the sink's file")
        async with producer(stack) as client:
            await client.send_and_wait(lines, None, key=b"whoever")
        await wait_until(lambda: stored(3), within=60, what="a tombstone in the sink's file")
    first, second, gone = out.read_text().splitlines()
    assert first.startswith(f"Struct{{id={lines}-0-0,model_version=sha256:")
    assert "text=The tide turns.,from=a file,vector=[" in first
    numbers = json.loads(first.partition("vector=")[2].removesuffix("}"))
    assert len(numbers) == 32
    assert sum(number**2 for number in numbers) == pytest.approx(1, abs=1e-4)
    assert "text=It turns again." in second
    assert gone == "null"


# -- Schema Registry ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with schema_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def client(url: str) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": url}) as found:
        yield found


@pytest.fixture
async def learning(url: str) -> AsyncIterator[Learning]:
    found = Learning(url)
    yield found
    await found.registry.close()


def value_of(topic: str) -> SerializationContext:
    return SerializationContext(topic, MessageField.VALUE)


async def test_what_confluents_serializers_write_beside_a_real_registry_is_read(
    learning: Learning, client: SchemaRegistryClient
) -> None:
    row = {"id": 7, "text": "tides", "price": 2.5}
    schema = {
        "title": "Article",
        "type": "object",
        "properties": {"id": {"type": "integer"}, "text": {"type": "string"}, "price": {"type": "number"}},
    }
    kind = message_class()
    written = [
        AvroSerializer(client, json.dumps(ARTICLE))(row, value_of("avro")),
        JSONSerializer(json.dumps(schema), client)(row, value_of("json")),
        ProtobufSerializer(kind, client, {"use.deprecated.format": False})(kind(**row), value_of("protobuf")),
    ]
    one = mapping(id="id", columns=["price"], output={"format": "connect"})
    for value in written:
        found = await learning.reading(one, value)
        assert (found.job.input, found.answer.id) == ("tides", 7)
        assert [(its.value, its.schema["type"]) for its in found.answer.columns] == [(2.5, "double")]
    with pytest.raises(BadRow, match="number 65535; the registry says 404"):
        await learning.reading(one, b"\0\0\0\xff\xffx")


async def test_results_are_registered_there_and_read_back_by_confluents_deserializer(
    learning: Learning, client: SchemaRegistryClient
) -> None:
    vector = b"\0\0\0\x3f" * 4
    for format in ("avro", "json-schema", "protobuf"):
        one = mapping(id="id", columns=["price"], output={"format": format, "topic": f"out.{format}"})
        found = await learning.reading(one, {"id": 7, "text": "tides", "price": 2.5})
        assert isinstance(found.answer, FlatAnswer)
        value = found.answer.value(vector, "sha256:x", truncated=False)
        written = framed(value, {}, "")
        assert written is not None
        assert client.get_latest_version(f"out.{format}-value").schema_id == written.schema
        if format == "avro":
            read = AvroDeserializer(client)(value, value_of(f"out.{format}"))
            assert read == {"id": 7, "model_version": "sha256:x", "price": 2.5, "vector": [0.5] * 4}
        elif format == "json-schema":
            text = client.get_latest_version(f"out.{format}-value").schema.schema_str
            jsonschema.validate(json.loads(written.payload), json.loads(text or ""))
        else:
            again = await learning.reading(
                mapping(text="model_version", id="id", columns={"numbers": "vector"}), value
            )
            assert (again.job.input, again.answer.columns[0].value) == ("sha256:x", [0.5] * 4)


async def test_a_schema_that_names_others_is_read_with_them(
    learning: Learning, client: SchemaRegistryClient
) -> None:
    author = {
        "type": "record",
        "name": "Author",
        "namespace": "shop",
        "fields": [{"name": "name", "type": "string"}],
    }
    client.register_schema("author", Schema(json.dumps(author), "AVRO"))
    book = {
        "type": "record",
        "name": "Book",
        "fields": [{"name": "text", "type": "string"}, {"name": "author", "type": "shop.Author"}],
    }
    number = client.register_schema(
        "book-value", Schema(json.dumps(book), "AVRO", [SchemaReference("shop.Author", "author", 1)])
    )
    value = number.to_bytes(5, "big") + b"\x0atides\x06Ann"
    found = await learning.reading(mapping(text="{author.name}: {text}"), value)
    assert found.job.input == "Ann: tides"
