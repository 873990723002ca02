"""One address that does not take its results: its own jobs are dead-lettered with a reason, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from tests.helpers.delivery import Answered, short_job, until_committed
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

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


@asynccontextmanager
async def administering(stack: DevStack) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def send(
    stack: DevStack, topics: Topics, jobs: list[dict[str, Any]], *, reply_topic: str | None = None
) -> None:
    headers = [] if reply_topic is None else [("reply-topic", reply_topic.encode())]
    async with producer(stack) as client:
        sent = [
            await client.send(topics.jobs, json.dumps(job).encode(), key=job["id"].encode(), headers=headers)
            for job in jobs
        ]
        await asyncio.gather(*sent)


async def letter(letters: Reader) -> ConsumerRecord:
    """The one dead letter."""
    [found] = await letters.until(1)
    return found


async def test_an_address_that_refuses_our_records_costs_its_own_jobs_alone(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    strict = f"{fresh_prefix()}.strict"
    topics = await make_topics(stack, fresh_prefix())
    async with administering(stack) as admin:
        await admin.create_topics(
            [NewTopic(strict, 1, 1, topic_configs={"message.timestamp.before.max.ms": "0"})]
        )
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with replicas(replica), reader(stack, topics.results) as results:
        before = [short_job(number) for number in range(100)]
        after = [short_job(number) for number in range(100, 200)]
        guilty = {"id": "guilty", "input": "a text", "dimensions": 32}
        await send(stack, topics, before)
        await send(stack, topics, [guilty], reply_topic=strict)
        await send(stack, topics, after)
        answered = Answered(results)
        await answered.until([job["id"] for job in (*before, guilty, *after)])
        [error] = [result for result in answered.results if result["id"] == "guilty"]
        assert error["error"]["code"] == "invalid_header"
        async with reader(stack, topics.dead_letters) as letters:
            found = await letter(letters)
        assert b"INVALID_TIMESTAMP" in (value_of(found.headers, "embedq-error-message") or b"")
        await until_committed(stack, topics)
        assert await replica.stop() == 0
    assert not {"producer_replaced", "failed"} & {event["event"] for event in replica.events()}


async def test_a_deleted_reply_topic_stays_deleted_and_its_jobs_are_told(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    gone = f"{fresh_prefix()}.gone"
    topics = await make_topics(stack, fresh_prefix(), names=[gone])
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with administering(stack) as admin, replicas(replica), reader(stack, topics.results) as results:
        async with reader(stack, gone) as replies:
            await send(stack, topics, [short_job(1)], reply_topic=gone)
            await replies.until(1)
        await admin.delete_topics([gone])

        async def is_gone() -> bool:
            return gone not in await admin.list_topics()

        await wait_until(is_gone, what="the end of the topic")
        # The first job comes while the replica still believes in the topic, the second one after it has seen that it is gone.
        answered = Answered(results)
        for number in (2, 3):
            await send(stack, topics, [short_job(number)], reply_topic=gone)
            await answered.until([f"job-{number}"])
        assert [result["error"]["code"] for result in answered.results] == ["invalid_header"] * 2
        assert await is_gone()

        await admin.create_topics([NewTopic(gone, 2, 1)])
        async with reader(stack, gone) as replies:
            await send(stack, topics, [short_job(4)], reply_topic=gone)
            [reply] = await replies.until(1)
        assert json.loads(reply.value)["id"] == "job-4"
        await until_committed(stack, topics)
        assert await replica.stop() == 0
