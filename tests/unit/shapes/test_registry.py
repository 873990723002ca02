"""Schema Registry: values that confluent-kafka's own serializers write are read, and a registry that is away loses nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.shapes import BadRow, Embeddable, FlatAnswer, Removal
from embedq_consumer.shapes.registry import schema_registry
from embedq_consumer.shapes.registry.schema_registry import (
    ConfluentClient,
    MissingExtra,
    RegistryOptions,
    Unreachable,
    connect,
)
from embedq_consumer.shapes.registry.schemas import (
    AvroReader,
    Fetch,
    Given,
    JsonReader,
    ProtobufReader,
    Refused,
    Registration,
    reader_of,
)
from embedq_consumer.shapes.registry.wire_format import Framed, frame, framed, message_indexes
from embedq_shared.secret import Secret
from tests.helpers.schema_registry import RegistryServer
from tests.helpers.shapes import Learning, mapping, message_class, reading
from tests.helpers.support import wait_until

VALUE = SerializationContext("rows", MessageField.VALUE)
KEY = SerializationContext("rows", MessageField.KEY)
AVRO = {
    "type": "record",
    "name": "Article",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "text", "type": ["null", "string"]},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {
            "name": "author",
            "type": {"type": "record", "name": "Author", "fields": [{"name": "name", "type": "string"}]},
        },
    ],
}
ROW = {"id": 7, "text": "tides", "at": 1_700_000_000_000, "author": {"name": "Ann"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for again is asked for soon."""
    monkeypatch.setattr(schema_registry, "_FIRST_PAUSE_S", 0.02)


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer().serving() as running:
        yield running


@pytest.fixture
def producer(server: RegistryServer) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": server.url}) as client:
        yield client


@pytest.fixture
async def learning(server: RegistryServer) -> AsyncIterator[Learning]:
    found = await asyncio.to_thread(Learning, server.url)  # as the service connects: its packages read files
    yield found
    await found.registry.close()


# -- confluent-kafka writes, we read -----------------------------------------------------------------------------------


async def test_avro_is_read_by_the_schema_that_it_was_written_with(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    written = AvroSerializer(producer, json.dumps(AVRO))(ROW, VALUE)
    one = mapping(id="id", columns={"at": "at", "by": "author.name"}, output={"format": "connect"})
    found = await learning.reading(one, written)
    assert isinstance(found, Embeddable)
    assert isinstance(found.answer, FlatAnswer)
    assert (found.job.input, found.answer.id) == ("tides", 7)
    at, by = found.answer.columns
    assert (at.value, at.schema["name"]) == (1_700_000_000_000, "org.apache.kafka.connect.data.Timestamp")
    assert by.value == "Ann"


async def test_json_with_a_schema_is_read(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    schema = {
        "title": "Article",
        "type": "object",
        "properties": {"id": {"type": "integer"}, "text": {"type": "string"}, "price": {"type": "number"}},
    }
    written = JSONSerializer(json.dumps(schema), producer)({"id": 7, "text": "tides", "price": 3}, VALUE)
    one = mapping(id="id", columns=["price"], output={"format": "connect"})
    found = await learning.reading(one, written)
    assert isinstance(found.answer, FlatAnswer)
    assert (found.job.input, found.answer.columns[0].schema["type"]) == ("tides", "double")


async def test_protobuf_is_read(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    kind = message_class()
    message = kind(id=2**40, text="tides", price=2.5, blob=b"\x00", tags=["a", "b"], kind=1)
    message.at.FromSeconds(1_700_000_000)
    message.note.value = "n"
    written = ProtobufSerializer(kind, producer, {"use.deprecated.format": False})(message, VALUE)
    one = mapping(id="id", columns=["price", "blob", "at", "note", "kind", "tags"])
    found = await learning.reading(one, written)
    assert isinstance(found.answer, FlatAnswer)
    assert (found.job.input, found.answer.id) == ("tides", 2**40)
    assert {column.name: column.value for column in found.answer.columns} == {
        "price": 2.5,
        "blob": b"\x00",
        "at": "2023-11-14T22:13:20Z",
        "note": "n",
        "kind": "NEWS",
        "tags": ["a", "b"],
    }


async def test_a_change_event_of_debezium_in_avro_is_read(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    envelope = {
        "type": "record",
        "name": "Envelope",
        "fields": [
            {"name": "before", "type": ["null", AVRO], "default": None},
            {"name": "after", "type": ["null", "Article"], "default": None},
            {"name": "op", "type": "string"},
        ],
    }
    serializer = AvroSerializer(producer, json.dumps(envelope))
    one = mapping(shape="debezium", id="id", columns=["at"], output={"format": "connect"})
    found = await learning.reading(one, serializer({"before": None, "after": ROW, "op": "c"}, VALUE))
    assert isinstance(found.answer, FlatAnswer)
    assert (found.job.input, found.answer.columns[0].schema["type"]) == ("tides", "int64")
    gone = await learning.reading(one, serializer({"before": ROW, "after": None, "op": "d"}, VALUE))
    assert gone == Removal(one, "7", b"7")


async def test_a_tombstones_key_is_read_by_its_schema(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    schema = {"type": "record", "name": "Key", "fields": [{"name": "id", "type": "long"}]}
    key = AvroSerializer(producer, json.dumps(schema))({"id": 7}, KEY)
    assert isinstance(await learning.reading(mapping(id="id"), None, key=key), Removal)


async def test_a_schema_of_others_is_read_with_them(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    author = {
        "type": "record",
        "name": "Author",
        "namespace": "shop",
        "fields": [{"name": "name", "type": "string"}],
    }
    producer.register_schema("author", Schema(json.dumps(author), "AVRO"))
    article = {
        "type": "record",
        "name": "Article",
        "fields": [{"name": "text", "type": "string"}, {"name": "author", "type": "shop.Author"}],
    }
    references = [SchemaReference("shop.Author", "author", 1)]
    number = producer.register_schema("rows-value", Schema(json.dumps(article), "AVRO", references))
    written = frame(number, b"\x0atides\x06Ann")
    found = await learning.reading(mapping(text="{author.name}: {text}"), written)
    assert found.job.input == "Ann: tides"


async def test_a_schemas_number_or_guid_may_be_in_a_header(
    server: RegistryServer, producer: SchemaRegistryClient, learning: Learning
) -> None:
    schema = {"type": "record", "name": "A", "fields": [{"name": "text", "type": "string"}]}
    producer.register_schema("rows-value", Schema(json.dumps(schema), "AVRO"))
    guid = bytes.fromhex(server.schemas[0]["guid"].replace("-", ""))
    for header in (b"\x01" + guid, frame(1, b"")):
        found = await learning.reading(mapping(), b"\x0atides", ("__value_schema_id", header))
        assert found.job.input == "tides"


# -- we write, and the registry numbers it -----------------------------------------------------------------------------


async def test_a_results_schema_is_registered_once_under_its_topic(
    server: RegistryServer, learning: Learning
) -> None:
    one = mapping(id="id", columns=["n"], output={"format": "avro"})
    for id in range(3):
        found = await learning.reading(one, {"id": id, "text": "t", "n": 1.5})
        assert found.answer.registered[1] == 1
    assert list(server.versions) == ["docs.vectors-value"]
    assert server.requests == ["POST /subjects/docs.vectors-value/versions"]


async def test_a_schema_that_the_registry_does_not_take_costs_that_row_alone(
    server: RegistryServer, learning: Learning
) -> None:
    server.refused = {'"n"'}
    one = mapping(columns="*", output={"format": "avro"})
    with pytest.raises(BadRow, match=r"expected a schema that the registry takes for docs\.vectors-value"):
        await learning.reading(one, {"text": "t", "n": 1})
    assert isinstance(await learning.reading(one, {"text": "t", "m": 1}), Embeddable)


# -- trouble -----------------------------------------------------------------------------------------------------------


async def test_a_registry_that_is_away_is_waited_for(server: RegistryServer, learning: Learning) -> None:
    server.schemas.append({"schema": json.dumps(AVRO), "schemaType": "AVRO", "guid": ""})
    server.away = True
    waiting = [asyncio.create_task(learning.registry.learn(Fetch(1))) for _ in range(5)]
    await wait_until(learning.is_waiting, within=10, what="a registry that is waited for")
    assert learning.said[0] is not None
    assert "waiting for the Schema Registry" in learning.said[0]
    assert learning.registry.reader(Fetch(1)) is None
    server.away = False
    await asyncio.gather(*waiting)
    assert learning.said[-1] is None
    assert not isinstance(learning.registry.reader(Fetch(1)), Refused | None)
    await learning.registry.close()


async def test_a_schema_that_nobody_has_refuses_its_row_and_is_not_asked_for_by_each(
    server: RegistryServer, learning: Learning
) -> None:
    for _ in range(2):
        with pytest.raises(BadRow, match="number 9; the registry says 404"):
            await learning.reading(mapping(), frame(9, b"x"))
    assert len(server.requests) == 3, (
        "looked for again a moment later, since a follower may lag, and then known"
    )


async def test_closing_ends_what_is_asked_for(server: RegistryServer, learning: Learning) -> None:
    server.away = True
    waiting = asyncio.create_task(learning.registry.learn(Fetch(1)))
    await wait_until(learning.is_waiting, within=10, what="a registry that is waited for")
    await learning.registry.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_without_a_registry_the_error_says_which_setting_is_missing() -> None:
    with pytest.raises(BadRow, match="schema_registry_url"):
        reading(mapping(), frame(1, b"x"))


def test_a_registry_nobody_listens_at_is_unreachable() -> None:
    client = connect(RegistryOptions(url="http://127.0.0.1:9"))
    assert isinstance(client, ConfluentClient)
    with pytest.raises(Unreachable):
        client.fetch(1)
    with pytest.raises(Unreachable):
        client.register(Registration("s", "AVRO", '"string"'))
    client.close()


@pytest.mark.parametrize(
    "schema",
    [
        Given(kind="XML", text="x"),
        Given(kind="AVRO", text="{"),
        Given(kind="AVRO", text='{"type": "nothing"}'),
        Given(kind="PROTOBUF", text='syntax = "proto3";'),
        Given(kind="JSON", text="{"),
    ],
)
def test_a_schema_that_cannot_be_used_says_so(schema: Given) -> None:
    with pytest.raises(ValueError, match=r"its type|no .* schema that can be used"):
        reader_of(schema)


READERS = [
    reader_of(Given(kind="AVRO", text=json.dumps(AVRO))),
    reader_of(Given(kind="JSON", text='{"type": "object"}')),
    reader_of(
        Given(
            kind="PROTOBUF",
            text=base64.b64encode(message_class().DESCRIPTOR.file.serialized_pb).decode(),
        )
    ),
]


@given(st.sampled_from(READERS), st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(reader: Any, data: bytes) -> None:
    try:
        reader.read(Framed(1, data))
    except BadRow as bad:
        assert bad.code == "malformed"  # noqa: PT017


@given(st.binary(max_size=40), st.none() | st.binary(max_size=24))
def test_any_frame_is_one_or_none_or_refused(data: bytes, header: bytes | None) -> None:
    headers = {} if header is None else {"h": header}
    try:
        found = framed(data, headers, "h")
        if found is not None:
            message_indexes(found.payload)
    except BadRow as bad:
        assert bad.code == "malformed"  # noqa: PT017


@given(st.integers(0, 2**32 - 1), st.binary(max_size=16))
def test_a_frame_reads_back(number: int, data: bytes) -> None:
    assert framed(frame(number, data), {}, "") == Framed(number, data)


def test_the_first_message_of_a_schema_has_the_short_form_and_others_the_long_one() -> None:
    assert message_indexes(b"\x00rest") == ((0,), 1)
    assert message_indexes(b"\x02\x02rest") == ([1], 2)
    assert message_indexes(b"\x04\x02\x00rest") == ([1, 0], 3)


@pytest.mark.parametrize("package", ["confluent_kafka.schema_registry", "fastavro", "google.protobuf"])
def test_without_its_packages_the_error_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'embedq\[schema-registry\]'"):
        connect(RegistryOptions(url="http://x"))


def test_a_registrys_password_goes_to_it_and_nowhere_else() -> None:
    options = RegistryOptions(url="http://x", username="u", password=Secret("hunter2"))
    assert "hunter2" not in repr(options)
    client = connect(options)
    assert isinstance(client, ConfluentClient)
    assert client._client._rest_client.auth == ("u", "hunter2")
    client.close()


def test_a_schema_whose_kind_the_registry_leaves_out_is_known_by_its_look() -> None:
    text = base64.b64encode(message_class().DESCRIPTOR.file.serialized_pb).decode()
    assert isinstance(reader_of(Given(kind="AVRO", text='{"type": "object", "properties": {}}')), JsonReader)
    assert isinstance(reader_of(Given(kind="AVRO", text=text)), ProtobufReader)
    assert isinstance(reader_of(Given(kind="AVRO", text='"string"')), AvroReader)
