"""Replicas come and go while jobs flow: nothing is lost, and an orderly leave repeats nothing."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, load, preload, short_job, until_committed, until_it_logged
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


async def test_replicas_that_join_and_leave_in_order_lose_and_repeat_no_job(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    one, two, three = (
        Replica(stack, topics, models / "a", tmp_path / name) for name in ("one", "two", "three")
    )
    async with replicas(one), reader(stack, topics.results) as results:
        try:
            async with load(stack, topics.jobs, results) as jobs:
                await jobs.progress(100)
                await asyncio.gather(two.start(), three.start())  # two joins
                await jobs.progress(100)
                assert await one.stop() == 0  # the one that began leaves
                await jobs.progress(100)
                await one.start()  # and comes back
                await jobs.progress(100)
                assert [*await asyncio.gather(two.stop(), three.stop())] == [0, 0]  # two leave at once
                await jobs.progress(100)
            await until_committed(stack, topics)
            assert await one.stop() == 0
            await jobs.answered.all()
        finally:
            for replica in (two, three):
                if replica.process is not None and replica.returncode is None:
                    replica.kill()
                    await replica.ended()
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert jobs.answered.duplicates() == 0


async def test_a_replica_frozen_beyond_its_session_loses_its_partitions_and_joins_again(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=4)
    bounds: dict[str, Any] = {"max_uncommitted_jobs": 32, "max_poll_records": 16}
    frozen, other = (
        Replica(stack, topics, models / "a", tmp_path / name, **bounds) for name in ("frozen", "other")
    )
    async with replicas(frozen, other), reader(stack, topics.results) as results:
        async with load(stack, topics.jobs, results, window=64) as jobs:
            await jobs.progress(100)
            assigned = sum(event["event"] == "partitions_assigned" for event in other.events())
            frozen.kill(signal.SIGSTOP)
            try:
                # Its jobs wait until the group has given it up; then the other one takes all partitions.
                await until_it_logged(other, "partitions_assigned", times=assigned + 1)
                await jobs.progress(100)
                assigned = sum(event["event"] == "partitions_assigned" for event in frozen.events())
            finally:
                frozen.kill(signal.SIGCONT)
            await until_it_logged(frozen, "partitions_assigned", times=assigned + 1)
            await jobs.progress(100)
        await until_committed(stack, topics)
        assert [*await asyncio.gather(frozen.stop(), other.stop())] == [0, 0]
        await jobs.answered.all()
    assert set(jobs.answered.counts()) == set(jobs.ids)
    # The other one answered again what the frozen one had not committed, of four partitions and a poll; and the frozen
    # one, awake, what it had fetched before it learned that its session is over: no more than the load leaves open.
    assert jobs.answered.duplicates() <= 4 * 32 + 16 + 64


async def test_replicas_share_each_lane_and_not_the_lanes_between_them(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=4)
    pair = [Replica(stack, topics, models / "a", tmp_path / name) for name in ("one", "two")]
    async with replicas(*pair), reader(stack, topics.results) as results:
        answered = Answered(results)
        for topic in topics.lanes:
            jobs = await preload(stack, topic, 200, partial(_job_of, topic))
            await answered.until(jobs)
        for replica in pair:
            metrics = await replica.metrics()
            for lane in ("interactive", "bulk"):
                assert metrics[f'embedq_records_total{{lane="{lane}"}}'] > 0


def _job_of(topic: str, number: int) -> dict[str, Any]:
    return short_job(number) | {"id": f"{topic}-{number}"}
