"""Ways to break a reload, on a fleet under load: the old model serves, the status says which step failed and why, and all agree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from embedq_sdk.dev import DevStack
from tests.broker.service.test_reload import (
    assert_each_vector_is_its_models_own,
    command,
    list_job,
    outcomes,
    own,
)
from tests.helpers.bad_models import copied
from tests.helpers.broken_reloads import WAYS
from tests.helpers.delivery import administering, load, statuses, until_committed
from tests.helpers.service_process import (
    Reader,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
    supervised,
)
from tests.helpers.support import patient, wait_until

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
            # Six deaths in a row with nothing done in between would be those of a job that kills.
            await until_committed(stack, topics, within=90.0)
        await jobs.progress(20)
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert_each_vector_is_its_models_own(jobs.answered.results, a, b)


@pytest.fixture(scope="module")
def own_kafka(stack: DevStack) -> Iterator[DevStack]:
    """A broker that this module may stop, beside the session's Redis."""
    with DevStack(environ={"EMBEDQ_REDIS_URL": stack.redis_url}) as running:
        yield running


async def test_a_broker_that_goes_away_in_mid_reload_leaves_a_fleet_that_agrees_within_a_minute(
    own_kafka: DevStack, models: Path, tmp_path: Path
) -> None:
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(own_kafka, fresh_prefix())
    where = tmp_path / "step"
    pair = [
        Replica(
            own_kafka,
            topics,
            models / "a",
            tmp_path / name,
            replica=name,
            python=["-m", "tests.helpers.waits_in_step", str(where)],
            drain_timeout_s=patient(3.0),
        )
        for name in ("one", "two")
    ]
    async with (
        replicas(*pair),
        producer(own_kafka) as client,
        reader(own_kafka, topics.results) as results,
        reader(own_kafka, topics.status) as status,
        load(own_kafka, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        await jobs.progress(20)

        # Away while the model is loaded, and back before anything must be drained: the command is followed.
        where.write_text("load")
        sent = await command(client, topics, 1, "b")
        await in_step(status, sent, "load", "one", "two")
        await asyncio.to_thread(own_kafka.stop_kafka, kill=True)
        await asyncio.to_thread(own_kafka.start_kafka)
        where.unlink()
        said = await agreement(status, sent, "one", "two")
        assert {(one["state"], one["model_version"]) for one in said} == {("READY", b.version)}
        await jobs.progress(20)

        # Away from the check on, for longer than a drain waits: the canary fails there and the fleet goes back, or nothing
        # was in flight, and the fleet goes on. Whichever it is, it is one model, and the statuses say which and why.
        where.write_text("check")
        sent = await command(
            client, topics, 2, "a", fallback="b", rollout={"max_unavailable": 1, "canary": True}
        )
        await in_step(status, sent, "check", "one")
        await asyncio.to_thread(own_kafka.stop_kafka, kill=True)
        where.unlink()
        await wait_until(
            lambda: any(
                event["event"] in ("reload_failed", "reload_done") for event in events_of(pair[0], 2)
            ),
            within=60,
            what="the outcome at the first replica",
        )
        await asyncio.to_thread(own_kafka.start_kafka)
        failed = any(event["event"] == "reload_failed" for event in events_of(pair[0], 2))
        last = {"version": 3, "command_id": sent["command_id"] + "-rollback"} if failed else sent
        said = await agreement(status, last, "one", "two")
        wanted = b.version if failed else a.version
        assert {(one["state"], one["model_version"]) for one in said} == {("READY", wanted)}
        if failed:
            assert all("drain: the jobs in flight were not finished" in one["error"] for one in said)
        await jobs.progress(20)
        assert [replica.returncode for replica in pair] == [None, None]
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert_each_vector_is_its_models_own(jobs.answered.results, a, b)


async def test_without_its_status_topic_a_fleet_serves_and_agrees_within_a_minute_once_that_is_back(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    a, b = await asyncio.to_thread(own, models / "a"), await asyncio.to_thread(own, models / "b")
    topics = await make_topics(stack, fresh_prefix())
    pair = [Replica(stack, topics, models / "a", tmp_path / name, replica=name) for name in ("one", "two")]
    waves = {"max_unavailable": 1, "canary": True}
    async with (
        replicas(*pair),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        load(stack, topics.jobs, results, window=16, make=list_job) as jobs,
    ):
        await jobs.progress(10)

        # It takes no record: nobody can have a turn, so all serve the old model, and follow once it does.
        async with administering(stack) as admin:
            await set_largest_record(admin, topics.status, 1)
            sent = await command(client, topics, 1, "b", fallback="a", rollout=waves)
            await jobs.progress(100)
            versions = {result["model_version"] for result in jobs.answered.results}
            assert versions == {a.version}
            await set_largest_record(admin, topics.status, 1_000_000)
        async with reader(stack, topics.status) as status:
            said = await agreement(status, sent, "one", "two")
            assert {(one["state"], one["model_version"]) for one in said} == {("READY", b.version)}

        # It is gone: a command without turns needs nobody's word.
        async with administering(stack) as admin:
            await admin.delete_topics([topics.status])
        sent = await command(client, topics, 2, "a")
        for replica in pair:
            await wait_until(
                lambda replica=replica: any(  # type: ignore[misc]
                    event["event"] == "reload_done" for event in events_of(replica, 2)
                ),
                within=AGREED_WITHIN_S,
                what="the new model",
            )
        await jobs.progress(20)

        # It is there again, and empty: the statuses come back by themselves, and the next command finds its turns.
        await make_topics(stack, topics.prefix, only=[topics.status])
        async with reader(stack, topics.status) as status:
            said = await agreement(status, sent, "one", "two")
            assert {(one["state"], one["model_version"]) for one in said} == {("READY", a.version)}
            sent = await command(client, topics, 3, "b", fallback="a", rollout=waves)
            said = await agreement(status, sent, "one", "two")
            assert {(one["state"], one["model_version"]) for one in said} == {("READY", b.version)}
        await jobs.progress(20)
        assert [replica.returncode for replica in pair] == [None, None]
    assert set(jobs.answered.counts()) == set(jobs.ids)
    assert assert_each_vector_is_its_models_own(jobs.answered.results, a, b) == {a.version, b.version}


def events_of(replica: Replica, version: int) -> list[dict[str, Any]]:
    """What a replica has logged of a command."""
    return [event for event in replica.events() if event.get("version") == version]


async def in_step(status: Reader, sent: dict[str, Any], step: str, *names: str) -> None:
    """Wait until these replicas are in a step of a command."""

    async def there() -> bool:
        found = {
            said["replica"]
            for said in await statuses(status)
            if (said["command_id"], said["step"]) == (sent["command_id"], step)
        }
        return found >= set(names)

    await wait_until(there, within=AGREED_WITHIN_S, what=f"step {step}")


async def agreement(status: Reader, sent: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """Each replica's last status, once that is the outcome of this command; within a minute."""
    last: dict[str, dict[str, Any]] = {}

    async def ended() -> bool:
        last.update({said["replica"]: said for said in await statuses(status)})
        return all(
            name in last
            and last[name]["command_id"] == sent["command_id"]
            and last[name]["state"] in ("READY", "FAILED")
            for name in names
        )

    await wait_until(ended, within=AGREED_WITHIN_S, what=f"an outcome of version {sent['version']}")
    return [last[name] for name in names]


async def set_largest_record(admin: AIOKafkaAdminClient, topic: str, size: int) -> None:
    """What a topic takes at most, in bytes; with 1 it takes nothing."""
    changed = ConfigResource(
        ConfigResourceType.TOPIC, topic, {"cleanup.policy": "compact", "max.message.bytes": str(size)}
    )
    await admin.alter_configs([changed])
