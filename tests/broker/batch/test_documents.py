"""Documents of a Kafka topic, as connectors write them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from embedq_batch import Columns, RunOptions, run
from embedq_batch.errors import BadSource
from embedq_batch.sources.opening import opened_source
from embedq_sdk.admin.topics import create_topics
from embedq_shared.topics import Topics
from tests.helpers.batch_runs import assert_vectors
from tests.helpers.fake_service import OLD
from tests.helpers.responder import Responder

pytestmark = pytest.mark.kafka

Record = tuple[Any, Any]


@asynccontextmanager
async def a_topic(servers: str) -> AsyncIterator[str]:
    name = f"documents-{uuid.uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 3, 1)])
        yield name
    finally:
        await admin.close()


async def written(servers: str, topic: str, records: Sequence[Record]) -> None:
    """Write records with JSON keys and values; None is null."""
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
        for key, value in records:
            await producer.send(
                topic,
                key=None if key is None else msgspec.json.encode(key),
                value=None if value is None else msgspec.json.encode(value),
            )
        await producer.flush()


async def test_a_topic_of_changes_leaves_the_last_version_of_each_document(
    servers: str, prefix: str, tmp_path: Path
) -> None:
    plain: list[Record] = [({"id": n}, {"id": n, "text": f"text {n}"}) for n in range(300)]
    envelopes: list[Record] = [
        ({"id": 3}, {"before": {"id": 3}, "after": {"id": 3, "text": "changed"}, "op": "u"}),
        ({"id": 4}, {"before": {"id": 4, "text": "text 4"}, "after": None, "op": "d"}),
        ({"id": 4}, None),
        ({"id": 5}, None),
        ({"schema": {}, "payload": {"id": 6}}, {"schema": {}, "payload": {"id": 6, "text": "six"}}),
        ({"id": 7}, None),
        ({"id": 7}, {"id": 7, "text": "text 7"}),
        ({"id": "bad"}, ["no document"]),
    ]
    expected = {str(n): f"text {n}" for n in range(300) if n not in (4, 5)} | {"3": "changed", "6": "six"}
    out = tmp_path / "out.jsonl"
    columns = Columns(id="id")
    async with a_topic(servers) as topic, Responder(servers, prefix):
        await written(servers, topic, [*plain, *envelopes])
        common: dict[str, Any] = {"servers": servers, "topic_prefix": prefix, "columns": columns}
        done = await run(f"kafka:{topic}", str(out), **common)
        assert (done.rows, done.failed) == (298, 1)
        assert_vectors(out, expected, OLD)

        await written(servers, topic, [({"id": 8}, {"id": 8, "text": "eight"}), ({"id": 9}, None)])
        done = await run(f"kafka:{topic}", str(out), options=RunOptions(only_changed=True), **common)
        del expected["9"]
        assert_vectors(out, expected | {"8": "eight"}, OLD)


async def test_a_topic_is_read_from_offsets_on(servers: str, prefix: str, tmp_path: Path) -> None:
    """A partition that is not named is read from its start."""
    async with a_topic(servers) as topic, Responder(servers, prefix):
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            for partition, n in product(range(3), range(10)):
                value = msgspec.json.encode({"id": f"{partition}-{n}", "text": f"text {partition} {n}"})
                await producer.send(topic, value=value, partition=partition)
            await producer.flush()
        common: dict[str, Any] = {"servers": servers, "topic_prefix": prefix, "columns": Columns(id="id")}

        done = await run(f"kafka:{topic}", str(tmp_path / "out.jsonl"), since={0: 7, 2: 10}, **common)

        assert (done.rows, done.failed) == (13, 0)
        read = [f"0-{n}" for n in range(7, 10)] + [f"1-{n}" for n in range(10)]
        texts = {id: f"text {id.replace('-', ' ')}" for id in read}
        assert_vectors(tmp_path / "out.jsonl", texts, OLD)
        with pytest.raises(BadSource, match="partition 0: offset 11: its log has 0 to 10"):
            await run(f"kafka:{topic}", str(tmp_path / "more.jsonl"), since={0: 11}, **common)


async def test_jobs_are_read_in_the_lanes_of_every_pool(servers: str) -> None:
    prefix = f"jobs-{uuid.uuid4().hex[:8]}"
    topics = Topics(prefix)
    for pool in (None, "large", "small"):
        await create_topics(servers, prefix=prefix, partitions=2, reply_partitions=1, pool=pool)
    lanes = [lane for pool in (None, "large", "small") for lane in topics.of(pool).lanes]
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
        for lane in lanes:
            job = {"id": lane, "input": f"a text in {lane}", "model": "any"}
            await producer.send_and_wait(lane, msgspec.json.encode(job))

    def read() -> tuple[str, dict[Any, Any]]:
        source = opened_source(["jobs"], Columns(), servers=servers, prefix=prefix)
        source.open()
        found = {
            id: text for batch in source.batches() for id, text in zip(batch.ids, batch.texts, strict=True)
        }
        source.close()
        return source.name, found

    name, found = await asyncio.to_thread(read)
    assert found == {lane: f"a text in {lane}" for lane in lanes}
    assert name == f"kafka:{topics.jobs}, kafka:{topics.bulk}", "as before there were pools: a run goes on"
