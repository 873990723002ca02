"""Redis may vanish at any time: jobs are computed then, and none waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import load, until_committed
from tests.helpers.hostile_redis import HOSTILE, hostile_redis
from tests.helpers.neighbors import assert_served, neighbors
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def own_redis(stack: DevStack) -> Iterator[DevStack]:
    """The session's broker with a Redis that this module may stop."""
    with DevStack(environ={"EMBEDQ_KAFKA_SERVERS": stack.kafka_servers}) as own:
        yield own


def repeated_job(number: int) -> dict[str, Any]:
    """Ten texts in turn, so that nearly every job could be a hit."""
    return {"id": f"job-{number}", "input": f"text number {number % 10}", "dimensions": 32}


def hits(results: list[dict[str, Any]]) -> int:
    return sum(result["data"][0]["cached"] for result in results)


async def test_redis_stopped_frozen_and_started_again_costs_no_job_and_no_repeat(
    own_redis: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own_redis, fresh_prefix())
    replica = Replica(own_redis, topics, models / "a", tmp_path / "log")
    async with replicas(replica), reader(own_redis, topics.results) as results:
        async with load(own_redis, topics.jobs, results, window=16, make=repeated_job) as jobs:
            await jobs.progress(100)
            assert hits(jobs.answered.results) > 0

            await asyncio.to_thread(own_redis.stop_redis, kill=True)
            await jobs.progress(200)
            assert not any(result["data"][0]["cached"] for result in jobs.answered.results[-50:])
            assert await replica.get("/readyz") == 200

            await asyncio.to_thread(own_redis.start_redis)
            before = hits(jobs.answered.results)
            while hits(jobs.answered.results) == before:  # the breaker tries again by itself
                await jobs.progress(20)

            await asyncio.to_thread(own_redis.pause_redis)
            try:
                await jobs.progress(200)
            finally:
                await asyncio.to_thread(own_redis.resume_redis)
            await jobs.progress(20)
        await until_committed(own_redis, topics)
        assert await replica.stop() == 0
        await jobs.answered.all()
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert jobs.answered.duplicates() == 0
    assert {len(result["data"][0]["embedding"]) for result in jobs.answered.results} == {32}


async def test_a_replica_that_starts_without_redis_serves_and_uses_it_once_it_is_there(
    own_redis: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own_redis, fresh_prefix())
    await asyncio.to_thread(own_redis.stop_redis)
    async with (
        replicas(Replica(own_redis, topics, models / "b", tmp_path / "log")),
        reader(own_redis, topics.results) as results,
        load(own_redis, topics.jobs, results, window=16, make=repeated_job) as jobs,
    ):
        await jobs.progress(50)
        assert hits(jobs.answered.results) == 0
        await asyncio.to_thread(own_redis.start_redis)
        while hits(jobs.answered.results) == 0:
            await jobs.progress(20)


async def test_a_redis_that_answers_what_no_redis_does_costs_nobody_a_job_or_a_wait(
    stack: DevStack, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    left = ["integers", "nested", "deep", "huge value", "endless line"]
    told: list[str] = []

    def next_answer(keys: int) -> bytes:
        told.append(left.pop(0) if left else told[-1])
        return HOSTILE[told[-1]](keys)

    topics = await make_topics(stack, fresh_prefix())
    async with hostile_redis() as hostile:
        replica = Replica(stack, topics, models / "a", tmp_path / "log")
        async with replicas(replica.in_environment({"EMBEDQ_REDIS_URL": hostile.url})):
            async with neighbors(stack, topics) as others:
                await others.progress(20)
                begun = time.monotonic()
                hostile.answer = next_answer
                await wait_until(lambda: not left, what="an answer of each kind")
                await others.progress(100)
            metrics = await replica.metrics()
            assert await replica.stop() == 0
    assert (
        sum(value for name, value in metrics.items() if name.startswith("embedq_cache_failures_total")) >= 5
    )
    assert_served(others, begun, record_property)
    assert others.repeats == 0
