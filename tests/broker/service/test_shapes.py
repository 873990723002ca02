"""Records as Kafka's world writes them, on a real broker: each is answered, deleted or dead-lettered, and none costs another."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import fastavro
import pytest
import yaml
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from embedq_sdk.admin.dead_letters import letter_of
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.ailing_model import AILING
from tests.helpers.delivery import until_it_logged
from tests.helpers.schema_registry import RegistryServer
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

ARTICLE: Final = {
    "type": "record",
    "name": "Article",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "text", "type": "string"},
        {"name": "price", "type": "double"},
    ],
}
CONNECT: Final = {
    "type": "struct",
    "optional": False,
    "fields": [
        {"field": "id", "type": "int64", "optional": False},
        {"field": "text", "type": "string", "optional": True},
        {"field": "price", "type": "double", "optional": True},
    ],
}


class World:
    """Topics, mappings and a replica that knows them."""

    def __init__(self, stack: DevStack, folder: Path, prefix: str) -> None:
        self.stack = stack
        self.topics = Topics(prefix)
        self.folder = folder
        self.mappings: dict[str, dict[str, Any]] = {}

    def name(self, topic: str) -> str:
        return f"{self.topics.prefix}-{topic}"

    def add(self, name: str, *, topic: bool = True, **part: Any) -> None:
        """A mapping whose topic and output topic have its name."""
        output = {"topic": self.name(f"{name}.out"), **part.pop("output", {})}
        text = (
            {} if part.get("shape") == "openai-batch" else {"text": "text", "id": "id", "columns": ["price"]}
        )
        self.mappings[name] = {
            **({"topics": [self.name(name)]} if topic else {}),
            **text,
            **part,
            "output": output,
        }

    async def made(self, *, missing: Iterable[str] = ()) -> None:
        names = [topic for part in self.mappings.values() for topic in part.get("topics", ())]
        names += [part["output"]["topic"] for part in self.mappings.values()]
        kept = [name for name in dict.fromkeys(names) if name not in missing]
        retries = [self.topics.retry(tier) for tier in (1, 2)]
        await make_topics(self.stack, self.topics.prefix, partitions=2, names=[*kept, *retries])
        (self.folder / "embedq.yaml").write_text(yaml.safe_dump({"mappings": self.mappings}))

    def replica(self, model: Path, name: str = "one", **settings: Any) -> Replica:
        return Replica(
            self.stack,
            self.topics,
            model,
            self.folder / name,
            redis=False,
            replica=name,
            mappings=self.folder / "embedq.yaml",
            **settings,
        )

    async def send(self, *records: tuple[Any, ...]) -> None:
        """Each is a topic, a value, and headers."""
        async with producer(self.stack) as client:
            for topic, value, *headers in records:
                key, value = (value.key, value.value) if isinstance(value, Keyed) else (None, value)
                await client.send_and_wait(topic, _bytes(value), key=key, headers=headers)


class Keyed(NamedTuple):
    """A value with a key; a tombstone without one."""

    key: bytes
    value: Any = None


def _bytes(given: Any) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else json.dumps(given).encode()


def change(op: str, before: Any = None, after: Any = None) -> dict[str, Any]:
    payload = {"before": before, "after": after, "op": op, "source": {"table": "articles"}}
    return {"schema": {"type": "struct", "fields": [{**CONNECT, "field": "after"}]}, "payload": payload}


def batch_line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


async def test_every_shape_is_answered_and_a_bad_record_costs_no_other(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    world = World(stack, tmp_path, fresh_prefix())
    world.add("rows")
    world.add("connect", shape="connect", output={"format": "connect", "vector": "text"})
    world.add("debezium", shape="debezium", columns="*", output={"nest": "payload"})
    world.add("avro", output={"format": "avro"})
    world.add("events", shape="cloudevents", id="ce_id", columns=["ce_type"])
    world.add("batch", shape="openai-batch", options={"model": "default", "dimensions": 32})
    world.add("named", topic=False, options={"dimensions": 32})
    await world.made()
    out = {name: world.name(f"{name}.out") for name in world.mappings}
    name, jobs = world.name, world.topics.jobs
    with RegistryServer().serving() as registry, SchemaRegistryClient({"url": registry.url}) as client:
        avro = AvroSerializer(client, json.dumps(ARTICLE))
        row = {"id": 1, "text": "hello", "price": 2.5}
        in_avro = avro({**row, "price": 7.0}, SerializationContext(name("avro"), MessageField.VALUE))
        event = {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": "article"}
        attributes = [(f"ce_{key}", its.encode()) for key, its in event.items()]
        structured = ("content-type", b"application/cloudevents+json")
        registry.away = True
        replica = world.replica(models / "a", schema_registry_url=registry.url)
        async with (
            replicas(replica),
            reader(stack, *out.values()) as results,
            reader(stack, world.topics.results) as errors,
            reader(stack, world.topics.dead_letters) as letters,
        ):
            await world.send(
                # Bad ones come first.
                (name("avro"), b"\x00\x00\x00\x00\x27no schema has this number"),
                (name("avro"), in_avro),
                (name("rows"), {"id": 9, "price": 3}),
                (name("rows"), row, ("kafka_replyTopic", world.topics.replies.encode())),
                (name("rows"), Keyed(b"2")),
                (name("connect"), {"schema": CONNECT, "payload": row}),
                (name("debezium"), Keyed(b'{"id": 1}', change("c", after=row))),
                (name("debezium"), Keyed(b'{"id": 3}', change("d", before={"id": 3}))),
                (name("events"), {"text": "binary"}, *attributes),
                (name("events"), event | {"id": "e-2", "data": {"text": "structured"}}, structured),
                (name("batch"), batch_line("b-1", input=["x", "y"], model="text-embedding-3-small")),
                (name("batch"), batch_line("b-2", input=[[1, 2, 3]], model="text-embedding-3-small")),
                (jobs, row | {"id": 4}, ("embedq-mapping", b"named")),
                (jobs, row, ("embedq-mapping", b"nobody")),
                (jobs, row),
                (jobs, {"input": [1, 2, 3]}),
                (jobs, {"input": "t", "model": "text-embedding-3-small"}),
            )
            await until_it_logged(replica, "waiting_for_schema_registry")
            found = [record for record in await results.until(10) if record.topic != out["avro"]]
            assert len(found) == 10, "nobody waits for the registry but who needs it"
            _, page = await replica.page("/readyz")
            assert "waiting for the Schema Registry" in page
            registry.away = False
            found = await results.until(11)
            await errors.until(6)
            await letters.until(3)
            assert await replica.stop() == 0
            assert [len(await each.all()) for each in (results, errors, letters)] == [11, 6, 3]
    by_topic = {(record.topic, record.key): record for record in found}

    def flat(topic: str, key: bytes) -> Any:
        return json.loads(by_topic[out[topic], key].value)

    plain = flat("rows", b"1")
    version = plain.pop("model_version")
    assert version.startswith("sha256:")
    assert len(plain.pop("vector")) == 256
    assert plain == {"id": 1, "price": 2.5}
    assert dict(by_topic[out["rows"], b"1"].headers)["embedq-model-version"].decode() == version
    assert by_topic[out["rows"], b"2"].value is None, "a tombstone with the same key"
    connect = flat("connect", b"1")
    assert {field["field"]: field["type"] for field in connect["schema"]["fields"]} == {
        "id": "int64",
        "model_version": "string",
        "price": "double",
        "vector": "string",
    }
    assert len(json.loads(connect["payload"]["vector"])) == 256
    assert flat("debezium", b"1")["payload"] == {"text": "hello", "price": 2.5}
    assert by_topic[out["debezium"], b"3"].value is None
    written = by_topic[out["avro"], b"1"].value
    schema = registry.schemas[int.from_bytes(written[1:5], "big") - 1]["schema"]
    decoded = fastavro.schemaless_reader(io.BytesIO(written[5:]), json.loads(schema), None)
    assert isinstance(decoded, dict)
    assert (decoded["id"], decoded["price"], len(decoded["vector"])) == (1, 7.0, 256)
    assert flat("events", b"e-1")["ce_type"] == "article"
    assert flat("events", b"e-2")["id"] == "e-2"
    data = flat("batch", b"b-1")["response"]["body"]["data"]
    assert [len(one["embedding"]) for one in data] == [32, 32]
    failed = flat("batch", b"b-2")["response"]
    assert failed["status_code"] == 400
    assert "check_embedding_ctx_length=False" in failed["body"]["error"]["message"]
    assert len(flat("named", b"4")["vector"]) == 32

    said = [json.loads(record.value)["error"]["message"] for record in errors.records]
    for words in (
        "mapping rows: `text`: expected a field of this name",
        "mapping avro: the value: expected a schema that can be read, got Schema Registry's number 39",
        "header `embedq-mapping`: expected the name of a mapping: ",
        "set a mapping with `shape: row`",
        "check_embedding_ctx_length=False",
        "OpenAI's model names mean nothing here",
    ):
        assert [words in message for message in said].count(True) == 1, (words, said)
    buried = [letter_of(0, 0, record.value, record.headers) for record in letters.records]
    assert sorted(letter.original_topic for letter in buried) == sorted([name("rows"), name("avro"), jobs])


@pytest.mark.slow
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
async def test_after_a_kill_the_results_of_each_key_end_as_its_rows_do(
    stack: DevStack, models: Path, tmp_path: Path, delivery: str
) -> None:
    """Many versions of few rows, long texts before short ones and deleted ones: whoever answers what came first last is seen."""
    world = World(stack, tmp_path, fresh_prefix())
    world.add("rows", columns=["n"])
    await world.made()
    rows = [_version(number) for number in range(1500)]
    async with producer(stack, enable_idempotence=True) as client:
        for key, value in rows:
            await client.send(world.name("rows"), _bytes(value), key=key)
    settings = {"bulk_delivery": delivery, "max_uncommitted_jobs": 200}
    first = world.replica(models / "a", "first", **settings)
    second = world.replica(models / "a", "second", **settings)
    async with replicas(first), reader(stack, world.name("rows.out"), committed=True) as results:
        await results.until(200)
        first.kill()
        await first.ended()
        async with replicas(second):
            await results.until(len(rows), within=120)

            async def is_over() -> bool:
                lag = {
                    k: v
                    for k, v in (await second.metrics()).items()
                    if k.startswith("embedq_lag") and "-rows" in k
                }
                return len(lag) == 2 and not any(lag.values())

            await wait_until(is_over, within=60, what="a commit of everything")
            assert await second.stop() == 0
        answered = await results.all()
    wanted: dict[bytes, list[int | None]] = {}
    for key, value in rows:
        wanted.setdefault(key, []).append(None if value is None else value["n"])
    got: dict[bytes, list[int | None]] = {}
    for record in answered:
        got.setdefault(record.key, []).append(None if record.value is None else json.loads(record.value)["n"])
    if delivery == "exactly-once":
        assert got == wanted
    else:
        assert {key: its[-1] for key, its in got.items()} == {key: its[-1] for key, its in wanted.items()}
        assert all(set(its) == set(wanted[key]) for key, its in got.items())
        assert all(_repeats_from_the_crash_on(its, wanted[key]) for key, its in got.items())


def _version(number: int) -> tuple[bytes, dict[str, Any] | None]:
    key = number * 7919 % 20
    if number % 5 == 4:
        return str(key).encode(), None
    return str(key).encode(), {
        "id": key,
        "text": f"text {number} " + "and more " * (40 if number % 2 else 0),
        "n": number,
    }


def _repeats_from_the_crash_on(got: list[int | None], wanted: list[int | None]) -> bool:
    """Whether this is the source's order, told once up to the crash and from somewhere before it again."""
    for before in range(len(wanted) + 1):
        again = len(got) - before
        if (
            got[:before] == wanted[:before]
            and 0 <= again <= len(wanted)
            and got[before:] == wanted[len(wanted) - again :]
        ):
            return True
    return False


@pytest.mark.slow
async def test_a_row_without_a_key_is_run_again_and_one_with_a_key_is_not(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    world = World(stack, tmp_path, fresh_prefix())
    world.add("rows")
    await world.made()
    file = tmp_path / "ailing"
    file.touch()
    replica = world.replica(models / "a", retry_delays_s="3,1").in_environment({AILING: str(file)})
    replica._python = ["-m", "tests.helpers.ailing_model"]
    async with (
        replicas(replica),
        reader(stack, world.name("rows.out")) as results,
        reader(stack, world.topics.retry(1)) as waiting,
        reader(stack, world.topics.dead_letters) as letters,
    ):
        await world.send(
            (world.name("rows"), {"id": 1, "text": "ailing one"}),
            (world.name("rows"), Keyed(b"2", {"id": 2, "text": "ailing two"})),
        )
        await waiting.until(1)
        [letter] = await letters.until(1)
        file.unlink()
        [answer] = await results.until(1)
        assert await replica.stop() == 0
    assert json.loads(answer.value)["id"] == 1
    told = letter_of(0, 0, letter.value, letter.headers)
    assert (letter.key, told.error_code, told.original_topic) == (b"2", "internal", world.name("rows"))


@pytest.mark.slow
async def test_a_topic_that_a_connector_makes_later_is_read_once_it_is_there(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    world = World(stack, tmp_path, fresh_prefix())
    world.add("rows")
    await world.made(missing=[world.name("rows")])
    replica = world.replica(models / "a")
    async with replicas(replica), reader(stack, world.name("rows.out")) as results:
        await until_it_logged(replica, "mapped_topics_missing")
        admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
        await admin.start()
        await admin.create_topics([NewTopic(world.name("rows"), 1, 1)])
        await admin.close()
        await world.send((world.name("rows"), {"id": 1, "text": "late"}))
        [answer] = await results.until(1, within=100)
        assert json.loads(answer.value)["id"] == 1


async def test_a_mapping_whose_results_have_no_topic_is_an_error_that_names_it(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    world = World(stack, tmp_path, fresh_prefix())
    world.add("rows")
    await world.made(missing=[world.name("rows.out")])
    replica = await world.replica(models / "a").start(ready=False)
    assert await replica.ended() == 1
    assert f"no topic {world.name('rows.out')} on the broker" in replica.log.read_text()
