"""Records that aiokafka cannot hand out: they end no command of an operator and no reader of results."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from contextlib import aclosing

import pytest
from aiokafka import TopicPartition

from embedq_sdk import EmbedClient, UnreadableReply
from embedq_sdk.admin.control import reload_model, service_status
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.result_reader import JobResult
from embedq_shared.kafka import (
    BoundedConsumer,
    Polled,
    UnreadableRecord,
    connect,
    poll,
    poll_partition,
    stop_client,
)
from embedq_shared.topics import Topics
from tests.helpers.command_line import Run
from tests.helpers.fake_replica import Replica
from tests.helpers.support import patient
from tests.helpers.unreadable_records import plain_producer, send_unreadable

pytestmark = pytest.mark.kafka

PARTITIONS = 3
NOT_UTF8 = "the name of a header is not UTF-8 (UnicodeDecodeError)"


@pytest.fixture
def topics(servers: str) -> Topics:
    """Topics without a past."""
    name = f"bad-{uuid.uuid4().hex[:8]}"
    asyncio.run(create_topics(servers, prefix=name, partitions=PARTITIONS, reply_partitions=1))
    return Topics(name)


def consumer_of(servers: str) -> BoundedConsumer:
    return BoundedConsumer(bootstrap_servers=servers, enable_auto_commit=False, auto_offset_reset="earliest")


def good_result(id: str) -> bytes:
    return (
        b'{"object":"list","id":"%s","model":"m","model_version":"v","dimensions":2,"dtype":"float32",'
        b'"data":[{"index":0,"embedding":[1.0,0.0]}]}' % id.encode()
    )


async def write_results(servers: str, topics: Topics) -> tuple[set[str], set[str]]:
    """Results on every partition with unreadable records first, in the middle, next to each other, and last.

    The ids of the good ones, and the places of the others.
    """
    good: set[str] = set()
    places: set[str] = set()
    async with plain_producer(servers) as client:

        async def send_good(partition: int, count: int) -> None:
            for _ in range(count):
                good.add(id := f"good-{len(good)}")
                await client.send_and_wait(topics.results, good_result(id), partition=partition)

        async def send_bad(partition: int) -> None:
            offset = await send_unreadable(client, topics.results, partition)
            places.add(f"{NOT_UTF8} at {topics.results}-{partition}, offset {offset}")

        await send_bad(0)
        for partition in range(PARTITIONS):
            await send_good(partition, 20)
        await send_bad(1)
        await send_bad(1)
        for partition in range(PARTITIONS):
            await send_good(partition, 20)
        await send_bad(2)
    return good, places


async def read(results: EmbedClient, to: int | str, *, group: str | None = None) -> list[JobResult]:
    """So many results, or those up to this one."""
    found: list[JobResult] = []
    async with aclosing(results.results(group=group, from_beginning=True, timeout=patient(20))) as read:
        async for result in read:
            found.append(result)
            if to in (len(found), result.id):
                break
    return found


@pytest.mark.parametrize("group", [None, "readers"])
async def test_a_reader_of_results_gets_all_good_ones_once_and_an_error_for_each_unreadable_one(
    servers: str, topics: Topics, group: str | None
) -> None:
    good, places = await write_results(servers, topics)
    group = group and f"{topics.prefix}-{group}"
    async with EmbedClient(servers, topic_prefix=topics.prefix) as client:
        found = await read(client, len(good) + len(places), group=group)

    assert Counter(result.id for result in found if result.error is None) == Counter(good)
    errors = [result.error for result in found if result.error is not None]
    assert all(isinstance(error, UnreadableReply) for error in errors)
    assert Counter(error.detail for error in errors if isinstance(error, UnreadableReply)) == Counter(places)


async def test_a_group_does_not_meet_an_unreadable_record_again(servers: str, topics: Topics) -> None:
    group = f"{topics.prefix}-group"
    async with (
        plain_producer(servers) as producer,
        EmbedClient(servers, topic_prefix=topics.prefix) as client,
    ):
        await send_unreadable(producer, topics.results)
        await producer.send_and_wait(topics.results, good_result("one"), partition=0)
        first = await read(client, 2, group=group)
        await producer.send_and_wait(topics.results, good_result("two"), partition=0)
        second = await read(client, "two", group=group)

    assert [type(result.error) for result in first] == [UnreadableReply, type(None)]
    # The result at which the first reader stopped was not taken back yet.
    assert [(result.id, result.error) for result in second if result.id != "one"] == [("two", None)]


async def test_status_and_reload_work_with_unreadable_records_on_both_topics(
    servers: str,
    topics: Topics,
    embedq: Run,
) -> None:
    async with plain_producer(servers) as producer:
        for _ in range(2):
            await send_unreadable(producer, topics.control, key=b"default")
            await send_unreadable(producer, topics.status, key=b"r0")
        async with Replica(servers, topics.prefix, "r1"):
            await send_unreadable(producer, topics.status, key=b"r0")
            found = await service_status(servers, topic_prefix=topics.prefix)
            shown = await embedq("status", "--prefix", topics.prefix)
            updates = [
                update
                async for update in reload_model(
                    servers, "/new", topic_prefix=topics.prefix, timeout=patient(30)
                )
            ]
            again = await embedq("reload", "/newer", "--prefix", topics.prefix)

    assert [replica.replica for replica in found.replicas] == ["r1"]
    assert shown.code == 0
    assert shown.out.startswith("r1 default READY")
    assert updates[-1].ok
    assert again.code == 0
    assert again.out.splitlines()[-1] == "default version 2: READY on 1 of 1 replicas"


async def test_a_poll_of_one_partition_gives_every_record_in_its_place(servers: str, topics: Topics) -> None:
    """Also where the unreadable record follows thousands of good ones that one fetch brings."""
    partition = TopicPartition(topics.jobs, 0)
    async with plain_producer(servers) as producer:
        sent = [await producer.send(topics.jobs, b"%d" % n, partition=0) for n in range(5_000)]
        await asyncio.gather(*sent)
        bad = await send_unreadable(producer, topics.jobs)
        await producer.send_and_wait(topics.jobs, b"last", partition=0)
    consumer = await connect(lambda: consumer_of(servers), 10.0)
    try:
        consumer.assign([partition])
        found: list[Polled] = []
        while len(found) < 5_002:
            found += await poll_partition(consumer, partition, timeout_ms=5_000)
    finally:
        assert await stop_client(consumer, 5.0) is None

    assert [record.offset for record in found] == list(range(5_002))
    assert found[bad] == UnreadableRecord(
        topic=topics.jobs, partition=0, first_offset=bad, offset=bad, reason=NOT_UTF8
    )
    last = found[-1]
    assert not isinstance(last, UnreadableRecord)
    assert last.value == b"last"


async def test_a_poll_while_other_partitions_are_busy_still_finds_the_unreadable_record(
    servers: str, topics: Topics
) -> None:
    partitions = [TopicPartition(topics.jobs, n) for n in range(PARTITIONS)]
    consumer = await connect(lambda: consumer_of(servers), 10.0)
    try:
        consumer.assign(partitions)
        async with plain_producer(servers) as producer:
            bad = await send_unreadable(producer, topics.jobs, 1)
            found: list[Polled] = []
            sent = 0
            while not any(isinstance(record, UnreadableRecord) for record in found):
                for partition in (0, 2):
                    await producer.send_and_wait(topics.jobs, b"%d" % sent, partition=partition)
                    sent += 1
                found += await poll(consumer, timeout_ms=1_000)
            while len(found) < sent + 1:
                found += await poll(consumer, timeout_ms=1_000)
    finally:
        assert await stop_client(consumer, 5.0) is None

    assert bad == 0
    places = Counter((record.partition, record.offset) for record in found)
    assert set(places.values()) == {1}
