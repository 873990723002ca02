"""The bulk lane under `exactly-once`: who reads committed records alone sees each result once, whatever happened."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.exactly_once import transactional_producers
from embedq_consumer.exactly_once.transactions import Parcel
from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.kafka import (
    FencedMember,
    KafkaError,
    MemberFenced,
    Membership,
    OffsetAndMetadata,
    TopicPartition,
)
from tests.helpers.delivery import Answered, long_job, preload, short_job, until_committed, until_it_logged
from tests.helpers.service_process import (
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
)
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

EXACTLY_ONCE: dict[str, Any] = {"bulk_delivery": "exactly-once"}


def counts(records: list[ConsumerRecord]) -> Counter[str]:
    return Counter(json.loads(record.value)["id"] for record in records)


@pytest.mark.slow
async def test_kills_repeat_no_result_for_readers_of_committed_records(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    ids = await preload(stack, topics.bulk, 600, long_job)
    one = Replica(stack, topics, models / "a", tmp_path / "one", replica="one", **EXACTLY_ONCE)
    async with replicas(one), reader(stack, topics.results, committed=True) as results:
        answered = Answered(results)
        for done in (60, 250):
            await answered.some(done)
            one.kill()
            await one.ended()
            await one.start()
        await answered.until(ids)
        await until_committed(stack, topics)
        assert await one.stop() == 0
        await answered.all()
    assert answered.counts() == Counter(ids)


@pytest.mark.slow
async def test_a_replica_that_sleeps_through_the_loss_of_its_partitions_publishes_nothing_twice(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    ids = await preload(stack, topics.bulk, 600, long_job)
    sleeper, other = (
        Replica(stack, topics, models / "a", tmp_path / name, replica=name, **EXACTLY_ONCE)
        for name in ("sleeper", "other")
    )
    async with replicas(sleeper, other), reader(stack, topics.results, committed=True) as results:
        answered = Answered(results)
        await answered.some(60)
        assigned = sum(event["event"] == "partitions_assigned" for event in other.events())
        sleeper.kill(signal.SIGSTOP)
        try:
            await until_it_logged(other, "partitions_assigned", times=assigned + 1)
        finally:
            sleeper.kill(signal.SIGCONT)
        await answered.until(ids)
        await until_committed(stack, topics)
        assert [*await asyncio.gather(sleeper.stop(), other.stop())] == [0, 0]
        await answered.all()
    assert answered.counts() == Counter(ids)


async def test_an_address_that_refuses_its_result_costs_no_other_job_its_answer(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    small = f"{topics.prefix}.small"
    await _make_topic(stack, small, {"max.message.bytes": "200"})
    async with producer(stack) as client:
        for number in range(20):
            headers = [("reply-topic", small.encode())] if number % 5 == 3 else []
            job = short_job(number) | {"dimensions": 256}
            await client.send(topics.bulk, json.dumps(job).encode(), headers=headers)
        await client.flush()
    one = Replica(
        stack, topics, models / "a", tmp_path / "one", replica="one", reply_topics=small, **EXACTLY_ONCE
    )
    async with (
        replicas(one),
        reader(stack, topics.results, committed=True) as results,
        reader(stack, topics.dead_letters, committed=True) as letters,
    ):
        await wait_until(lambda: _has(results, 20), within=60, what="20 results")
        await until_committed(stack, topics)
        assert await one.stop() == 0
        found = await results.all()
        buried = await letters.all()
    assert counts(found) == Counter({f"job-{number}": 1 for number in range(20)})
    said = [json.loads(record.value).get("error") for record in found]
    assert [error["code"] for error in said if error] == ["result_too_large"] * 4
    assert [value_of(letter.headers, "embedq-error-code") for letter in buried] == [b"result_too_large"] * 4


async def test_what_a_fenced_transaction_sent_is_never_seen(stack: DevStack) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    make = transactional_producers(
        {"bootstrap_servers": stack.kafka_servers},
        topics.prefix,
        timeout_ms=int(patient(15_000)),
        max_bytes=1_000_000,
    )
    nobody = FencedMember(group=topics.prefix, membership=Membership("nobody", 7))
    offsets = {TopicPartition(topics.bulk, 0): OffsetAndMetadata(1, "")}
    producer = make()
    await producer.start()
    try:
        for attempt in (b"first", b"second"):
            await producer.begin()
            assert await producer.send([_result(topics.results, attempt)], patient(10)) == [None]
            with pytest.raises(MemberFenced):
                await producer.add_offsets(offsets, nobody)
            await producer.abort()
        await producer.begin()
        assert await producer.send([_result(topics.results, b"third")], patient(10)) == [None]
        await producer.commit()
    finally:
        await producer.abandon()
    async with reader(stack, topics.results, committed=True) as results:
        assert [record.value for record in await results.all()] == [b"third"]


@pytest.mark.slow
async def test_a_transaction_that_hangs_holds_its_readers_up_until_the_brokers_end_it_and_no_longer(
    stack: DevStack,
) -> None:
    """Its producer lives, and could go on: what it sent is never seen, and it cannot commit any more."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    options = {"bootstrap_servers": stack.kafka_servers}
    hung, other = (
        transactional_producers(options, f"{topics.prefix}.{name}", timeout_ms=1_000, max_bytes=1_000_000)()
        for name in ("hung", "other")
    )
    try:
        for one, value in ((hung, b"hung"), (other, b"other")):
            await one.start()
            await one.begin()
            assert await one.send([_result(topics.results, value)], patient(10)) == [None]
        await other.commit()
        async with (
            reader(stack, topics.results) as all_results,
            reader(stack, topics.results, committed=True) as committed,
        ):
            assert [record.value for record in await all_results.until(2)] == [b"hung", b"other"]
            # They look every 10 s for transactions whose time is over.
            assert [record.value for record in await committed.until(1)] == [b"other"]
            with pytest.raises(KafkaError):
                await hung.commit()
            assert [record.value for record in await committed.all()] == [b"other"]
    finally:
        await hung.abandon()
        await other.abandon()


def _result(topic: str, value: bytes) -> Parcel:
    record = Outgoing(topic=topic, partition=0, key=None, value=value, headers=[])
    return Parcel(record=record, place=(topic, 0), alone=False)


async def _has(results: Any, count: int) -> bool:
    return len(await results.all()) >= count


async def _make_topic(stack: DevStack, name: str, configs: dict[str, str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])
    finally:
        await admin.close()
