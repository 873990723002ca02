"""One address that does not take its results: its own jobs are dead-lettered with a reason, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import NewTopic

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from tests.helpers.delivery import Answered, administering, short_job, until_committed
from tests.helpers.neighbors import assert_served, neighbors
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


async def guilty_ones(results: Reader) -> list[dict[str, Any]]:
    """The results of the jobs that name the address."""
    found = [json.loads(record.value) for record in await results.all()]
    return [result for result in found if result["id"].startswith("guilty")]


async def test_an_address_that_refuses_our_records_costs_its_own_jobs_alone(
    stack: DevStack, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    strict = f"{fresh_prefix()}.strict"
    topics = await make_topics(stack, fresh_prefix())
    async with administering(stack) as admin:
        await admin.create_topics(
            [NewTopic(strict, 1, 1, topic_configs={"message.timestamp.before.max.ms": "0"})]
        )
    replica = Replica(stack, topics, models / "a", tmp_path / "log", reply_topics="*")
    guilty: list[dict[str, Any]] = [
        {"id": f"guilty-{number}", "input": f"a text {number}", "dimensions": 32} for number in range(10)
    ]
    async with (
        replicas(replica),
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
        reader(stack, strict) as taken,
    ):
        async with neighbors(stack, topics, rate=100) as others:
            await others.progress(50)
            begun = time.monotonic()
            for job in guilty:
                await send(stack, topics, [job], reply_topic=strict)
                await others.progress(10)

            async def all_settled() -> bool:
                """What is written within its millisecond is not too old for the topic: that one is answered there."""
                refused = [result["error"] for result in await guilty_ones(results)]
                assert {error["code"] for error in refused} <= {"invalid_header"}
                return len(refused) + len(await taken.all()) == len(guilty)

            await wait_until(all_settled, what="an end of each of these jobs")
        refused = {result["id"] for result in await guilty_ones(results)}
        assert len(refused) >= len(guilty) / 2
        found = await letters.until(len(refused))
        assert {json.loads(letter.value)["id"] for letter in found} == refused
        assert {value_of(letter.headers, "reply-topic") for letter in found} == {strict.encode()}
        for reason in [value_of(letter.headers, "embedq-error-message") or b"" for letter in found]:
            assert reason.startswith(b"header `reply-topic`: expected a topic that takes results")
            assert b"INVALID_TIMESTAMP" in reason
        await until_committed(stack, topics)
        assert await replica.stop() == 0
    assert_served(others, begun, record_property)
    assert others.repeats == 0
    assert not {"producer_replaced", "failed"} & {event["event"] for event in replica.events()}


async def test_a_deleted_reply_topic_stays_deleted_and_its_jobs_are_told(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    gone = f"{fresh_prefix()}.gone"
    topics = await make_topics(stack, fresh_prefix(), names=[gone])
    replica = Replica(stack, topics, models / "a", tmp_path / "log", reply_topics="*")
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
