"""The broker goes away, freezes, comes back: on a Kafka of this module's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import load, until_committed, until_it_logged
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import wait_until

OUTAGE_S: Final = float(os.environ.get("EMBEDQ_TEST_OUTAGE_S", "0"))
"""How much longer than it takes to notice Kafka is away; 180 for the promise in full."""

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(240 + OUTAGE_S)]


@pytest.fixture(scope="module")
def own(stack: DevStack) -> Iterator[DevStack]:
    """A broker that this module may stop, beside the session's Redis."""
    with DevStack(environ={"EMBEDQ_REDIS_URL": stack.redis_url}) as running:
        yield running


async def test_a_broker_stopped_and_started_again_costs_no_job_and_no_process(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log")
    async with replicas(replica):
        async with reader(own, topics.results) as results, load(own, topics.jobs, results) as jobs:
            await jobs.progress(100)
            await asyncio.to_thread(own.stop_kafka)
            await asyncio.to_thread(own.start_kafka)
            await jobs.progress(200)
        await until_committed(own, topics)
        assert replica.returncode is None
        assert await replica.stop() == 0
    assert set(jobs.answered.counts()) == set(jobs.ids)


async def test_a_frozen_broker_costs_no_job_and_no_process(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log")
    async with replicas(replica):
        async with reader(own, topics.results) as results, load(own, topics.jobs, results) as jobs:
            await jobs.progress(100)
            await asyncio.to_thread(own.pause_kafka)
            await asyncio.sleep(5)  # the fault itself, as long as it lasts
            await asyncio.to_thread(own.resume_kafka)
            await jobs.progress(200)
        await until_committed(own, topics)
        assert await replica.stop() == 0
    assert set(jobs.answered.counts()) == set(jobs.ids)


async def test_kafka_may_be_away_for_as_long_as_it_likes(own: DevStack, models: Path, tmp_path: Path) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log", reply_timeout_s=1)

    async def says_why() -> bool:
        return "Kafka has taken nothing" in (await replica.page("/readyz"))[1]

    async with replicas(replica):
        async with reader(own, topics.results) as results, load(own, topics.jobs, results) as jobs:
            await jobs.progress(100)
            await asyncio.to_thread(own.stop_kafka, kill=True)
            try:
                await wait_until(says_why, what="a reason why it is not ready")
                await asyncio.sleep(OUTAGE_S)  # the fault itself, as long as it lasts
                assert await replica.get("/livez") == 200
            finally:
                await asyncio.to_thread(own.start_kafka)
            await jobs.progress(1, within=15)
            await jobs.progress(200)
            await replica.until_ready()
        await until_committed(own, topics)
        async with reader(own, topics.dead_letters) as letters:
            assert await letters.all() == []
        assert await replica.stop() == 0
    assert set(jobs.answered.counts()) == set(jobs.ids)


async def test_a_replica_that_is_started_without_kafka_waits_for_it(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log")
    stopped = Replica(own, topics, models / "a", tmp_path / "stopped")

    async def waits(waiting: Replica) -> bool:
        return "waiting for Kafka" in (await waiting.page("/readyz"))[1]

    await asyncio.to_thread(own.stop_kafka)
    try:
        await replica.start(ready=False)
        await stopped.start(ready=False)
        for each in (replica, stopped):
            await wait_until(partial(waits, each), within=60, what="a replica that waits for Kafka")
        assert await stopped.stop() == 0
    finally:
        await asyncio.to_thread(own.start_kafka)
    await replica.until_ready()
    assert await replica.stop() == 0


async def test_told_to_stop_while_the_broker_is_gone_it_ends_within_its_limits(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log", drain_timeout_s=3)
    async with replicas(replica):
        await asyncio.to_thread(own.stop_kafka)
        try:
            await replica.stop()
        finally:
            await asyncio.to_thread(own.start_kafka)
    assert replica.returncode in (0, 1)
    assert "Traceback" not in await asyncio.to_thread(replica.log.read_text)
    await until_it_logged(replica, "draining", within=1)
