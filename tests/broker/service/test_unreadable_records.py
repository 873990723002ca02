"""Records that the Kafka client itself has trouble with: compressed in any way, not to be read at all, or addressed to what is gone."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from embedq_sdk.dev import DevStack
from embedq_shared.headers import reply_partition_bytes, value_of
from embedq_shared.topics import Topics
from tests.helpers.service_process import (
    Reader,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
)
from tests.helpers.support import wait_until
from tests.helpers.unreadable_records import send_unreadable

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


def job(id: str, **fields: Any) -> bytes:
    return json.dumps({"input": f"text of {id}", "dimensions": 32, "id": id} | fields).encode()


def ids(records: list[ConsumerRecord]) -> Counter[str]:
    return Counter(json.loads(record.value)["id"] for record in records)


async def send_bad_job(client: AIOKafkaProducer, topic: str, partition: int) -> str:
    """Write a job that the client cannot read; its place."""
    offset = await send_unreadable(client, topic, partition, value=job("unreadable"))
    return f"{topic}-{partition}-{offset}"


async def test_a_job_in_each_codec_is_answered(stack: DevStack, models: Path, tmp_path: Path) -> None:
    """Each on the same partition as a plain job after it."""
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    codecs = ("gzip", "snappy", "lz4", "zstd")
    async with producer(stack) as plain, reader(stack, topics.results) as results:
        for codec in codecs:
            async with producer(stack, compression_type=codec) as client:
                # Long enough that the producer does not leave it as it is.
                await client.send_and_wait(topics.jobs, job(codec, input=["a b c " * 100] * 3), partition=0)
            await plain.send_and_wait(topics.jobs, job(f"after {codec}"), partition=0)
        async with replicas(replica):
            found = await results.until(8)
            assert ids(found) == Counter([*codecs, *(f"after {codec}" for codec in codecs)])
            assert {value_of(record.headers, "embedq-status") for record in found} == {b"ok"}
            assert await replica.stop() == 0


async def test_a_record_that_cannot_be_read_costs_no_other_one(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """Both lanes have a backlog on every partition, with unreadable records in the middle, next to each other, and last."""
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False, max_poll_records=64)
    good: set[str] = set()
    poison: set[str] = set()
    async with (
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
    ):

        async def send_good(count: int) -> None:
            sending = []
            for topic in topics.lanes:
                for partition in range(4):
                    for _ in range(count):
                        good.add(id := f"good {len(good)}")
                        sending.append(await client.send(topic, job(id), partition=partition))
            await asyncio.gather(*sending)

        async def send_bad(topic: str, partition: int) -> None:
            poison.add(await send_bad_job(client, topic, partition))

        await send_bad(topics.jobs, 3)  # the first record of its partition
        await send_good(30)
        await send_bad(topics.jobs, 1)
        await send_bad(topics.jobs, 1)
        await send_bad(topics.bulk, 2)
        await send_good(30)
        await send_bad(topics.jobs, 0)
        async with replicas(replica):
            await results.until(len(good) + len(poison))
            await send_good(3)  # after the last one, while the service idles
            await send_bad(topics.bulk, 2)
            await send_good(3)
            found = await results.until(len(good) + len(poison))
            assert await replica.stop() == 0
        found = await results.all()
        assert ids(found) == Counter([*good, *poison])
        for record in found:
            answer = json.loads(record.value)
            if answer["id"] in poison:
                assert (answer["error"]["code"], answer["error"]["retryable"]) == ("malformed", False)
                assert record.topic == topics.results
            else:
                assert answer["object"] == "list"
        places: Counter[str] = Counter()
        for letter in await letters.all():
            headers = dict(letter.headers)
            assert headers["embedq-error-code"] == b"malformed"
            [partition] = struct.unpack(">i", headers["kafka_dlt-original-partition"])
            [offset] = struct.unpack(">q", headers["kafka_dlt-original-offset"])
            place = f"{headers['kafka_dlt-original-topic'].decode()}-{partition}-{offset}"
            places[place] += 1
            assert (letter.key, letter.value) == (place.encode(), None)
        assert places == Counter(poison)


async def test_the_next_replica_meets_no_unreadable_record_again(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    first, second = (
        Replica(stack, topics, models / "a", tmp_path / name, redis=False) for name in ("first", "second")
    )
    async with producer(stack) as client, reader(stack, topics.results) as results:
        async with replicas(first):
            await send_bad_job(client, topics.jobs, 0)
            await results.until(1)
            assert await first.stop() == 0
        async with replicas(second):
            await client.send_and_wait(topics.jobs, job("after"), partition=0)
            await results.until(2)
            assert await second.stop() == 0
        assert [*ids(await results.all())] == [f"{topics.jobs}-0-0", "after"]


# -- reply addresses that change ------------------------------------------------------------------------------------------


async def admin_of(stack: DevStack) -> AIOKafkaAdminClient:
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    return admin


async def test_a_reply_topic_that_grew_is_used_to_its_last_partition(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    mine = f"{topics.prefix}.mine"
    admin = await admin_of(stack)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    try:
        async with replicas(replica), producer(stack) as client, reader(stack, topics.results) as results:
            await admin.create_topics([NewTopic(mine, 1, 1)])
            await wait_until(lambda: _has(admin, mine, 1), what="the topic")
            await _send_to(client, topics, "before", mine, 0)
            async with reader(stack, mine) as replies:
                await replies.until(1)
            await admin.create_partitions({mine: NewPartitions(total_count=3)})
            await wait_until(lambda: _has(admin, mine, 3), what="the new partitions")
            await _send_to(client, topics, "after", mine, 2)
            await _send_to(client, topics, "beyond", mine, 3)
            async with reader(stack, mine) as replies:
                await replies.until(2)
                assert {json.loads(r.value)["id"]: r.partition for r in replies.records} == {
                    "before": 0,
                    "after": 2,
                }
            [rejected] = await results.until(1)
            assert json.loads(rejected.value)["error"]["param"] == "reply-partition"
            assert await replica.stop() == 0
    finally:
        await admin.close()


async def test_a_reply_topic_that_vanished_costs_its_own_jobs_their_replies_and_nothing_else(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    mine = f"{topics.prefix}.mine"
    admin = await admin_of(stack)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    try:
        async with replicas(replica), producer(stack) as client, reader(stack, topics.results) as results:
            await admin.create_topics([NewTopic(mine, 1, 1)])
            await wait_until(lambda: _has(admin, mine, 1), what="the topic")
            await _send_to(client, topics, "before", mine, 0)
            async with reader(stack, mine) as replies:
                await replies.until(1)
            await admin.delete_topics([mine])
            await wait_until(lambda: _has(admin, mine, 0), what="the topic's end")
            await _send_to(client, topics, "after", mine, 0)
            await client.send_and_wait(topics.jobs, job("good"), partition=0)
            found = {json.loads(r.value)["id"]: r for r in await results.until(2, within=100)}
            assert set(found) == {"good", "after"}
            error = json.loads(found["after"].value)["error"]
            assert (error["code"], error["param"]) == ("invalid_header", "reply-topic")
            assert value_of(found["after"].headers, "correlation-id") == b"after"
            assert replica.returncode is None
            assert await replica.stop() == 0
    finally:
        await admin.close()


async def test_a_result_too_large_for_its_reply_topic_is_an_error_and_spares_the_other_results(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    narrow = f"{topics.prefix}.narrow"
    admin = await admin_of(stack)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    try:
        await admin.create_topics([NewTopic(narrow, 1, 1, topic_configs={"max.message.bytes": "3000"})])
        await wait_until(lambda: _has(admin, narrow, 1), what="the topic")
        async with (
            producer(stack) as client,
            reader(stack, topics.results) as results,
            reader(stack, narrow) as replies,
        ):
            small = [f"small {number}" for number in range(40)]
            for id in small[:20]:
                await _send_to(client, topics, id, narrow, 0)
            await _send_to(client, topics, "large", narrow, 0, dimensions=256, metadata={"a": "b"})
            for id in small[20:]:
                await _send_to(client, topics, id, narrow, 0)
            async with replicas(replica):
                await results.until(1)
                await replies.until(len(small))
                assert await replica.stop() == 0
            assert ids(await replies.all()) == Counter(small)
            [rejected] = await results.all()
            answer = json.loads(rejected.value)
            assert (answer["id"], answer["error"]["code"]) == ("large", "result_too_large")
            assert answer["metadata"] == {"a": "b"}
            assert value_of(rejected.headers, "correlation-id") == b"large"
    finally:
        await admin.close()


async def _send_to(
    client: AIOKafkaProducer, topics: Topics, id: str, topic: str, partition: int, **fields: Any
) -> None:
    headers = [
        ("correlation-id", id.encode()),
        ("reply-topic", topic.encode()),
        ("reply-partition", reply_partition_bytes(partition)),
    ]
    await client.send_and_wait(topics.jobs, job(id, **fields), partition=0, headers=headers)


async def _has(admin: AIOKafkaAdminClient, topic: str, partitions: int) -> bool:
    if topic not in await admin.list_topics():  # asking for it by name would create it
        return partitions == 0
    [described] = await admin.describe_topics([topic])
    return len(described["partitions"]) == partitions


# -- models that must not be loaded ---------------------------------------------------------------------------------------


async def test_a_model_from_outside_the_root_or_with_pickled_weights_is_never_loaded(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    outside = tmp_path / "outside"
    for path in (root / "model", outside, root / "pickled"):
        await asyncio.to_thread(_copy, models / "a", path)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (root / "link").symlink_to(outside, target_is_directory=True)
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, root / "model", tmp_path / "log", redis=False)
    paths = {str(outside): "below", "../outside": "below", "link": "below", "model/../../outside": "below",
             "": "", "\0": "directory", "pickled": "never loaded", "n" * 5000: ""}  # fmt: skip
    async with replicas(replica), producer(stack) as client, reader(stack, topics.status) as status:
        await client.send_and_wait(topics.jobs, job("before"))
        for version, (name, why) in enumerate(paths.items(), 1):
            command = {"alias": "default", "version": version, "path": name, "command_id": f"c{version}"}
            value = json.dumps(command).encode()
            await client.send_and_wait(topics.control, value, key=b"default", partition=0)
            if name:  # an empty one is no control record
                error = await _failure(status, f"c{version}")
                assert why in error, name
        async with reader(stack, topics.results) as results:
            await client.send_and_wait(topics.jobs, job("after"))
            before, after = (json.loads(record.value) for record in await results.until(2))
            assert before["model_version"] == after["model_version"]
        assert await replica.get("/readyz") == 200
        assert await replica.stop() == 0


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


async def _failure(status: Reader, command_id: str) -> str:
    """Why a command failed."""
    found: list[str] = []

    async def failed() -> bool:
        for record in await status.all():
            said = json.loads(record.value)
            if said["command_id"] == command_id and said["state"] == "FAILED":
                found.append(said["error"])
        return bool(found)

    await wait_until(failed, what=f"the failure of {command_id}")
    return found[0]
