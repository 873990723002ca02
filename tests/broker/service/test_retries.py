"""Bulk jobs whose address takes nothing wait and are run again: one that heals is answered, one that does not is dead-lettered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from embedq_sdk.admin.dead_letters import letter_of
from embedq_sdk.dev import DevStack
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import Topics
from tests.helpers.delivery import short_job, until_it_logged
from tests.helpers.service_process import (
    Reader,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
)
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

DELIVERIES: Final = ("at-least-once", "exactly-once")


class Addresses:
    """Reply topics that take nothing, since they ask for more copies than there are brokers, until they are mended."""

    def __init__(self, stack: DevStack) -> None:
        self._admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)

    async def __aenter__(self) -> Self:
        await self._admin.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admin.close()

    async def make_sick(self, *names: str) -> None:
        sick = {"min.insync.replicas": "2"}
        await self._admin.create_topics([NewTopic(name, 1, 1, topic_configs=sick) for name in names])

    async def mend(self, name: str) -> None:
        resource = ConfigResource(ConfigResourceType.TOPIC, name, configs={"min.insync.replicas": "1"})
        await self._admin.alter_configs([resource])


async def topics_with_tiers(stack: DevStack) -> Topics:
    prefix = fresh_prefix()
    names = [Topics(prefix).retry(tier) for tier in (1, 2)]
    return await make_topics(stack, prefix, partitions=2, names=names)


async def send(stack: DevStack, topics: Topics, jobs: Iterable[dict[str, Any]], reply_topic: str) -> None:
    headers = [("reply-topic", reply_topic.encode()), ("correlation-id", b"c")]
    async with producer(stack) as client:
        for job in jobs:
            await client.send(
                topics.bulk,
                json.dumps(job).encode(),
                key=job["id"].encode(),
                headers=headers,
                timestamp_ms=1000,
            )
        await client.flush()


async def committed(stack: DevStack, topics: Topics) -> bool:
    """Whether nothing is left on the bulk lane and the retry topics."""
    names = (topics.bulk, topics.retry(1), topics.retry(2))
    async with reader(stack, *names, committed=True) as all_of_them:
        records = await all_of_them.all()
    last = {(r.topic, r.partition): r.offset + 1 for r in records}
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        stored = await admin.list_consumer_group_offsets(f"{topics.prefix}.embedq")
    finally:
        await admin.close()
    done = {(p.topic, p.partition): its.offset for p, its in stored.items()}
    return all(done.get(where, 0) >= end for where, end in last.items())


def ids(found: Iterable[Any]) -> Counter[str]:
    return Counter(json.loads(record.value)["id"] for record in found)


async def has(found: Reader, count: int) -> bool:
    return len(await found.all()) >= count


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_an_address_that_heals_gets_its_answer_and_one_that_does_not_ends_in_the_dead_letters(
    stack: DevStack, models: Path, tmp_path: Path, delivery: str
) -> None:
    topics = await topics_with_tiers(stack)
    heals, never = f"{topics.prefix}.heals", f"{topics.prefix}.never"
    replica = Replica(
        stack,
        topics,
        models / "a",
        tmp_path / "log",
        replica="one",
        bulk_delivery=delivery,
        retry_delays_s=f"{patient(3):.1f},{patient(1):.1f}",
        reply_timeout_s=1,
    )
    async with Addresses(stack) as addresses:
        await addresses.make_sick(heals, never)
        async with (
            replicas(replica),
            reader(stack, topics.retry(1), committed=True) as first,
            reader(stack, heals, committed=True) as healed,
            reader(stack, topics.results, committed=True) as results,
            reader(stack, topics.dead_letters, committed=True) as buried,
        ):
            await send(stack, topics, [short_job(1)], heals)
            await send(stack, topics, [short_job(2)], never)
            await wait_until(lambda: has(first, 2), within=60, what="two jobs that wait")
            await addresses.mend(heals)
            [answer] = await healed.until(1, within=90)
            [letter] = await buried.until(1, within=90)
            [error] = await results.until(1)
            await wait_until(lambda: committed(stack, topics), within=30, what="a commit of everything")
            metrics = await replica.metrics()
            assert await replica.stop() == 0
            found = [*await healed.all(), *await results.all(), *await buried.all()]
    assert len(found) == 3, "each once"
    assert (json.loads(answer.value)["object"], json.loads(answer.value)["id"]) == ("list", "job-1")
    assert dict(answer.headers)["correlation-id"] == b"c"
    assert (json.loads(error.value)["id"], json.loads(error.value)["error"]["code"]) == (
        "job-2",
        "undeliverable",
    )
    told = letter_of(0, 0, letter.value, letter.headers)
    assert (told.original_topic, told.attempts, told.original_timestamp) == (topics.bulk, 3, 1000)
    assert [run.code for run in told.retries] == ["undeliverable", "undeliverable"]
    assert metrics['embedq_retries_total{reason="undeliverable",tier="1"}'] == 2
    assert metrics['embedq_retries_total{reason="undeliverable",tier="2"}'] == 1


@pytest.mark.slow
@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_a_kill_loses_no_job_that_waits_and_under_exactly_once_repeats_none(
    stack: DevStack, models: Path, tmp_path: Path, delivery: str
) -> None:
    topics = await topics_with_tiers(stack)
    heals = f"{topics.prefix}.heals"
    jobs = [short_job(number) for number in range(300)]
    replica = Replica(
        stack,
        topics,
        models / "a",
        tmp_path / "log",
        replica="one",
        bulk_delivery=delivery,
        retry_delays_s=f"{patient(3):.1f},{patient(3):.1f}",
        reply_timeout_s=1,
    )
    async with Addresses(stack) as addresses:
        await addresses.make_sick(heals)
        async with (
            replicas(replica),
            reader(stack, topics.retry(1), committed=True) as first,
            reader(stack, topics.retry(2), committed=True) as second,
            reader(stack, heals, committed=True) as healed,
            reader(stack, topics.dead_letters, committed=True) as buried,
        ):
            await send(stack, topics, jobs, heals)
            # While jobs go to the first tier, while they come back from it, and while they are answered.
            for waits in (first, second):
                await wait_until(partial(has, waits, 50), within=90, what="50 that wait")
                replica.kill()
                await replica.ended()
                if waits is second:
                    await addresses.mend(heals)
                await replica.start()
            await wait_until(lambda: has(healed, 50), within=120, what="50 answers")
            replica.kill()
            await replica.ended()
            await replica.start()
            wanted = {job["id"] for job in jobs}
            await wait_until(
                lambda: _all_there(healed, buried, wanted), within=120, what="every job's answer"
            )
            await wait_until(lambda: committed(stack, topics), within=60, what="a commit of everything")
            assert await replica.stop() == 0
            answered, letters = ids(await healed.all()), ids(await buried.all())
    assert answered.keys() | letters.keys() == wanted
    if delivery == "exactly-once":
        assert (answered + letters).total() == len(jobs), "each once"


async def _all_there(healed: Reader, buried: Reader, wanted: set[str]) -> bool:
    return {*ids(await healed.all()), *ids(await buried.all())} >= wanted


async def test_a_job_that_waits_moves_to_another_replica_and_is_answered_there(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await topics_with_tiers(stack)
    heals = f"{topics.prefix}.heals"
    one, two = (
        Replica(
            stack,
            topics,
            models / "a",
            tmp_path / name,
            replica=name,
            retry_delays_s=f"{patient(5):.1f}",
            reply_timeout_s=1,
        )
        for name in ("one", "two")
    )
    async with Addresses(stack) as addresses:
        await addresses.make_sick(heals)
        async with (
            replicas(one, two),
            reader(stack, topics.retry(1)) as first,
            reader(stack, heals) as healed,
        ):
            await send(stack, topics, [short_job(number) for number in range(8)], heals)
            await wait_until(lambda: has(first, 8), within=60, what="jobs that wait")
            await addresses.mend(heals)
            assert await one.stop() == 0
            await until_it_logged(two, "partitions_assigned", times=2)
            await wait_until(lambda: has(healed, 8), within=60, what="every answer")
            await wait_until(lambda: committed(stack, topics), within=30, what="a commit of everything")
            assert await two.stop() == 0
            answered = ids(await healed.all())
    assert answered == Counter(f"job-{number}" for number in range(8))
    places = {TopicPartition(record.topic, record.partition) for record in first.records}
    assert len(places) == 2, "the jobs of two partitions wait on two"
