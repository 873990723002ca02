"""The broker goes away, freezes, comes back: on a Kafka of this module's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, load, long_job, preload, until_committed, until_it_logged
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


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


async def test_a_broker_gone_for_longer_than_allowed_ends_the_process_and_the_next_one_answers_the_rest(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    first = Replica(own, topics, models / "a", tmp_path / "first", publish_timeout_s=2)
    second = Replica(own, topics, models / "a", tmp_path / "second")
    async with replicas(first):
        async with reader(own, topics.results) as results:
            ids = await preload(own, topics.jobs, 600, long_job)
            await Answered(results).some(50)
        await asyncio.to_thread(own.stop_kafka)
        try:
            assert await first.ended() == 1
        finally:
            await asyncio.to_thread(own.start_kafka)
    failures = [event for event in first.events() if event["event"] == "failed"]
    assert {event["reason"] for event in failures} == {"BrokerUnavailable"}
    assert "Traceback" not in await asyncio.to_thread(first.log.read_text)
    async with replicas(second), reader(own, topics.results) as results:
        answered = Answered(results)
        await answered.until(ids)
        await until_committed(own, topics)
        assert await second.stop() == 0


async def test_told_to_stop_while_the_broker_is_gone_it_ends_within_its_limits(
    own: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(own, fresh_prefix())
    replica = Replica(own, topics, models / "a", tmp_path / "log", publish_timeout_s=3, drain_timeout_s=3)
    async with replicas(replica):
        await asyncio.to_thread(own.stop_kafka)
        try:
            await replica.stop()
        finally:
            await asyncio.to_thread(own.start_kafka)
    assert replica.returncode in (0, 1)
    assert "Traceback" not in await asyncio.to_thread(replica.log.read_text)
    await until_it_logged(replica, "draining", within=1)
