"""No job is lost when a replica is killed, and repeats are bounded by what it had in flight."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from tests.helpers.delivery import (
    Answered,
    long_job,
    preload,
    send_unreadable,
    short_job,
    uncommitted,
    until_committed,
)
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

_JOBS = 3000
"""So many that both replicas are at work when a sixth is answered, however fast they are."""
_IN_FLIGHT = 128
_POLL = 32
_PARTITIONS = 4
_UNCOMMITTED = 32


async def test_a_replica_killed_half_way_and_a_restarted_redis_lose_no_job(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=_PARTITIONS)
    bounds: dict[str, Any] = {
        "max_in_flight_jobs": _IN_FLIGHT,
        "max_poll_records": _POLL,
        "max_uncommitted_jobs": _UNCOMMITTED,
    }
    victim, survivor = (
        Replica(stack, topics, models / "a", tmp_path / name, **bounds) for name in ("victim", "survivor")
    )
    async with replicas(victim, survivor), reader(stack, topics.results) as results:
        answered = Answered(results)
        ids = await preload(stack, topics.jobs, _JOBS, long_job)
        await answered.some(_JOBS // 6)
        victim.kill()
        await victim.ended()
        assert await uncommitted(stack, topics) > 0  # it was killed at work
        await asyncio.to_thread(stack.stop_redis)
        try:
            await answered.more()
        finally:
            await asyncio.to_thread(stack.start_redis)
        await answered.until(ids)
        await until_committed(stack, topics)
        assert await survivor.stop() == 0

        await answered.all()
        assert set(answered.counts()) == set(ids)
        assert all(result["object"] == "list" for result in answered.results)
        assert answered.duplicates() <= _PARTITIONS * _UNCOMMITTED + _POLL


async def test_a_job_that_was_not_committed_is_answered_again_and_from_the_cache(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """An hour between commits: everything that a killed replica answered is repeated, with the same vectors."""
    topics = await make_topics(stack, fresh_prefix())
    async with reader(stack, topics.results) as results:
        answered = Answered(results)
        first = Replica(stack, topics, models / "a", tmp_path / "first", commit_interval_ms=3_600_000)
        async with replicas(first):
            # A partition's first record brings a commit of its own, which says who works on it.
            early = await preload(stack, topics.jobs, 8, lambda number: short_job(1_000 + number))
            await answered.until(early)
            ids = await preload(stack, topics.jobs, 50)
            await answered.until(ids)
            assert answered.duplicates() == 0
            before = list(answered.results)
            first.kill()
            await first.ended()
        second = Replica(stack, topics, models / "a", tmp_path / "second")
        async with replicas(second):
            await answered.some(len(before) + len(ids))
            await until_committed(stack, topics)
            assert await second.stop() == 0
        await answered.all()
        assert {answered.counts()[id] for id in ids} == {2}
        again = answered.results[len(before) :]
        vectors = {result["id"]: result["data"][0]["embedding"] for result in before}
        assert all(result["data"][0]["cached"] for result in again)
        assert all(result["data"][0]["embedding"] == vectors[result["id"]] for result in again)


async def test_a_record_that_no_client_can_read_does_not_stop_its_partition(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    good = json.dumps(short_job(0)).encode()
    async with producer(stack) as client, reader(stack, topics.results, topics.dead_letters) as results:
        for _ in range(2):
            await client.send_and_wait(topics.jobs, good, partition=0)
            await send_unreadable(client, topics.jobs, 0, b"unreadable")
        await client.send_and_wait(topics.jobs, good, partition=0)
        replica = Replica(stack, topics, models / "a", tmp_path / "log")
        async with replicas(replica):
            await results.until(3 + 2 + 2)
            await until_committed(stack, topics)
            assert await replica.stop() == 0
        await results.all()
    answers = [json.loads(record.value) for record in results.records if record.topic == topics.results]
    assert [answer["id"] for answer in answers if answer["object"] == "list"] == ["job-0"] * 3
    errors = [answer for answer in answers if answer["object"] == "error"]
    assert sorted(error["id"] for error in errors) == [f"{topics.jobs}-0-1", f"{topics.jobs}-0-3"]
    assert {error["error"]["code"] for error in errors} == {"malformed"}
    letters = [record for record in results.records if record.topic == topics.dead_letters]
    assert {value_of(letter.headers, "__connect.errors.offset") for letter in letters} == {b"1", b"3"}
    assert len(letters) == 2


async def test_behind_a_job_that_takes_long_no_more_is_answered_than_a_crash_may_repeat(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """Cached jobs overtake one that computes for seconds, but only so many of the same partition."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    replica = Replica(
        stack, topics, models / "qwen", tmp_path / "log", max_poll_records=16, max_uncommitted_jobs=64
    )

    def job(number: int) -> dict[str, object]:
        if number == 1:
            texts = [f"{place} of {topics.prefix}" + " and so on" * 1000 for place in range(12)]
            return {"id": "slow", "input": texts, "dimensions": 32}
        return {"id": f"job-{number}", "input": f"always the same in {topics.prefix}", "dimensions": 32}

    async with replicas(replica), reader(stack, topics.results) as results:
        answered = Answered(results)
        await preload(stack, topics.jobs, 1, job)  # into the cache
        await answered.some(1)
        await until_committed(stack, topics)
        async with producer(stack, enable_idempotence=True) as client:
            sent = [
                await client.send(topics.jobs, json.dumps(job(number)).encode(), partition=0)
                for number in range(1, 400)
            ]
            await asyncio.gather(*sent)
        await answered.some(400)
        await until_committed(stack, topics)
        assert await replica.stop() == 0
    order = [result["id"] for result in answered.results]
    assert 1 < order.index("slow") <= 1 + 64 + 16
    assert answered.duplicates() == 0
