"""Ways to break a reload, on a fleet under load: the old model serves, the status says which step failed and why, and all agree."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.broker.service.test_reload import (
    assert_each_vector_is_its_models_own,
    command,
    list_job,
    outcomes,
    own,
)
from tests.helpers.bad_models import copied
from tests.helpers.broken_reloads import WAYS
from tests.helpers.delivery import load, statuses
from tests.helpers.service_process import (
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
    supervised,
)
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(900)]

POLICIES: Final = ("availability_preserving", "resource_preserving")
AGREED_WITHIN_S: Final = 60


async def test_whatever_is_wrong_with_a_model_the_old_one_serves_and_the_status_says_why(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    copied(models / "a", root / "a")
    copied(models / "a", tmp_path / "outside")
    for name, way in WAYS.items():
        await asyncio.to_thread(way.make, models / "a", root / name)
    a = await asyncio.to_thread(own, models / "a")
    topics = await make_topics(stack, fresh_prefix())
    pair = [Replica(stack, topics, root / "a", tmp_path / name, replica=name) for name in ("one", "two")]
    async with (
        replicas(*pair),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        await jobs.progress(10)
        version, unlike = 0, []
        for policy in POLICIES:
            for name, way in WAYS.items():
                version += 1
                asked: dict[str, Any] = {"policy": policy} | way.asked
                sent = await command(client, topics, version, way.path or name, **asked)
                for said in await outcomes(status, sent, 2):
                    found = (said["state"], said["step"], said["model_version"])
                    if found != ("FAILED", way.step, a.version) or way.told not in said["error"]:
                        unlike.append((policy, name, *found, said["error"]))
        assert not unlike
        await jobs.progress(20)
        assert [replica.returncode for replica in pair] == [None, None]
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert assert_each_vector_is_its_models_own(jobs.answered.results, a) == {a.version}


@pytest.mark.parametrize("policy", POLICIES)
async def test_whichever_step_a_replica_is_killed_in_the_fleet_agrees_within_a_minute(
    stack: DevStack, models: Path, tmp_path: Path, policy: str
) -> None:
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    fatal = tmp_path / "fatal"
    mortal = Replica(
        stack,
        topics,
        models / "a",
        tmp_path / "mortal",
        replica="mortal",
        python=["-m", "tests.helpers.dies_in_step", str(fatal)],
    )
    other = Replica(stack, topics, models / "a", tmp_path / "other", replica="other")
    async with (
        supervised(mortal, other) as ends,
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.status) as status,
        load(stack, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        for version, step in enumerate(("validate", "load", "warm_up", "check", "drain", "swap"), 1):
            fatal.write_text(step)
            wanted = (a, b)[version % 2]
            sent = await command(client, topics, version, "ab"[version % 2], policy=policy)

            async def agreed(
                number: int = version, id: str = sent["command_id"], version: str = wanted.version
            ) -> bool:
                last = {said["replica"]: said for said in await statuses(status)}
                ready = [
                    said["replica"]
                    for said in last.values()
                    if (said["command_id"], said["state"], said["model_version"]) == (id, "READY", version)
                ]
                return len(ends) == number and sorted(ready) == ["mortal", "other"]

            await wait_until(agreed, within=AGREED_WITHIN_S, what=f"an agreement after a death in {step}")
            assert (ends[-1].replica, ends[-1].code) == (mortal, -9)
        await jobs.progress(20)
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert_each_vector_is_its_models_own(jobs.answered.results, a, b)


async def test_without_its_status_topic_a_replica_follows_commands_all_the_same(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        load(stack, topics.jobs, results, window=8, make=list_job) as jobs,
    ):
        await jobs.progress(10)
        await delete(stack, topics)
        await command(client, topics, 1, "b")
        await wait_until(
            lambda: any(result["model_version"] == b.version for result in jobs.answered.results),
            within=AGREED_WITHIN_S,
            what="a vector of the new model",
        )
        await jobs.progress(10)
        assert replica.returncode is None
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert assert_each_vector_is_its_models_own(jobs.answered.results, a, b) == {a.version, b.version}


async def delete(stack: DevStack, topics: Topics) -> None:
    """Take the status topic away."""
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_servers)
    await admin.start()
    try:
        await admin.delete_topics([topics.status])
    finally:
        await admin.close()
