"""How a replica ends: told to, told twice, while it loads, and when a part of it cannot go on."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.delivery import Answered, long_job, preload, uncommitted, until_it_logged
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


async def test_what_was_accepted_is_answered_and_committed_and_the_next_replica_repeats_nothing(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    first, second = (
        Replica(stack, topics, models / "a", tmp_path / name, max_in_flight_jobs=64)
        for name in ("first", "second")
    )
    async with reader(stack, topics.results) as results:
        answered = Answered(results)
        async with replicas(first):
            ids = await preload(stack, topics.jobs, 600, long_job)
            await answered.some(100)
            assert await first.stop() == 0
        await answered.all()
        assert answered.duplicates() == 0
        left = await uncommitted(stack, topics)
        assert 0 < left < len(ids)  # it was told in the middle of its work
        assert len(answered.counts()) == len(ids) - left
        async with replicas(second):
            await answered.until(ids)
            assert await second.stop() == 0
        await answered.all()
    assert answered.duplicates() == 0
    assert await uncommitted(stack, topics) == 0


async def test_in_an_interpreter_of_its_own_it_ends_with_code_0_and_nobody_complains(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """Others of these start as forks, which end without freeing what they have."""
    topics = await make_topics(stack, fresh_prefix())
    strict = ("-W", "error::ResourceWarning", "-m", "embedq_consumer")
    replica = Replica(stack, topics, models / "a", tmp_path / "log", python=strict)
    async with replicas(replica), reader(stack, topics.results) as results:
        answered = Answered(results)
        await answered.until(await preload(stack, topics.jobs, 5))
        assert await replica.stop() == 0
    assert [line for line in replica.log.read_text().splitlines() if line and not line.startswith("{")] == []


async def test_told_to_stop_while_the_model_loads_it_ends_with_code_0_and_takes_no_job(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    await preload(stack, topics.jobs, 5)
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with reader(stack, topics.results) as results:
        try:
            await replica.start(ready=False)
            await wait_until(lambda: replica.port() is not None, what="a replica that has begun to load")
            assert await replica.stop() == 0
        finally:
            if replica.returncode is None:
                replica.kill()
                await replica.ended()
        assert await results.all() == []
    assert not any(event["event"] == "ready" for event in replica.events())
    assert await uncommitted(stack, topics) == 5


async def test_told_twice_it_ends_at_once_and_the_next_replica_answers_the_rest(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    hurried, second = (
        Replica(stack, topics, models / "a", tmp_path / name) for name in ("hurried", "second")
    )
    async with reader(stack, topics.results) as results:
        answered = Answered(results)
        async with replicas(hurried):
            ids = await preload(stack, topics.jobs, 1500, long_job)
            await answered.some(10)
            hurried.kill(signal.SIGTERM)
            await until_it_logged(hurried, "draining")
            hurried.kill(signal.SIGTERM)
            assert await hurried.ended() == -signal.SIGTERM
        async with replicas(second):
            await answered.until(ids)
            assert await second.stop() == 0
    assert set(answered.counts()) == set(ids)


async def test_without_its_topics_it_ends_with_code_1_and_says_which_are_missing(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log", topic_prefix=f"{topics.prefix}.other")
    await replica.start(ready=False)
    assert await replica.ended() == 1
    [failure] = [event for event in replica.events() if event["event"] == "failed"]
    assert failure["reason"] == "MissingTopics"
    assert f"{topics.prefix}.other.jobs" in failure["detail"]
    assert "embedq topics create" in failure["detail"]


async def test_two_replicas_told_at_once_leave_nothing_uncommitted(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    pair = [Replica(stack, topics, models / "a", tmp_path / name) for name in ("one", "two")]
    async with replicas(*pair), reader(stack, topics.results) as results:
        answered = Answered(results)
        ids = await preload(stack, topics.jobs, 600, long_job)
        await answered.some(100)
        assert await asyncio.gather(*(replica.stop() for replica in pair)) == [0, 0]
        await answered.all()
        assert answered.duplicates() == 0
        assert len(answered.counts()) == len(ids) - await uncommitted(stack, topics)
