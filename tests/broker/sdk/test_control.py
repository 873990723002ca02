"""Reload and status over a real Kafka, with replicas that follow a program."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from embedq_sdk import EmbedClient, InvalidArgument, TopicMissing
from embedq_sdk.admin import NothingBefore, UnexpectedVersion, control, rollback_model
from embedq_sdk.admin.control import LostRace, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.admin.topics import create_topics
from embedq_shared.messages import Control, Rollout
from embedq_shared.topics import Topics
from tests.helpers.fake_replica import Replica, failing, failing_in_turn, silent
from tests.helpers.support import patient

pytestmark = pytest.mark.kafka


@pytest.fixture
def fresh(servers: str) -> str:
    """Control and status topics without a past."""
    name = f"ctl-{uuid.uuid4().hex[:8]}"
    asyncio.run(create_topics(servers, prefix=name, partitions=2, reply_partitions=1))
    return name


async def reload(servers: str, prefix: str, path: str = "/models/new", **more: Any) -> list[RolloutUpdate]:
    return [u async for u in reload_model(servers, path, topic_prefix=prefix, timeout=patient(30), **more)]


async def test_a_reload_ends_when_every_replica_is_ready(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1") as first, Replica(servers, fresh, "r2"):
        updates = await reload(servers, fresh, digest="sha256:" + "c" * 64, min_cosine=0.5)

    assert not any(update.done for update in updates[:-1])
    assert updates[-1].ok
    assert [r.replica for r in updates[-1].replicas] == ["r1", "r2"]
    (command,) = first.commands
    assert (command.version, command.path, command.alias) == (1, "/models/new", "default")
    assert (command.digest, command.min_cosine, command.fallback) == ("sha256:" + "c" * 64, 0.5, None)
    assert command.policy is None
    assert command.rollout == Rollout(max_unavailable=1, canary=True)


async def test_versions_rise_and_the_fallback_is_what_serves(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh) as replica:
        await reload(servers, fresh, "/one")
        await reload(servers, fresh, "/two")
        replica.steps = failing
        broken = await reload(servers, fresh, "/broken")
        again = await reload(servers, fresh, "/broken-again")
        await reload(servers, fresh, "/other", alias="other")

    assert broken[-1].progress == "failed"
    assert broken[-1].replicas[0].error == "no such directory"
    assert again[-1].progress == "failed"
    assert [(c.version, c.fallback) for c in replica.commands] == [
        (1, None),
        (2, "/one"),
        (3, "/two"),
        (4, "/two"),
        (1, None),
    ]


async def test_one_failed_replica_fails_the_reload(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1"), Replica(servers, fresh, "r2", failing):
        updates = await reload(servers, fresh)

    assert updates[-1].progress == "failed"
    assert [(r.state, r.outcome) for r in updates[-1].replicas] == [("READY", "READY"), ("READY", "FAILED")]


async def test_a_failure_in_a_turn_is_taken_back_by_the_watcher_where_no_replica_does(
    servers: str, fresh: str
) -> None:
    async with Replica(servers, fresh, "r1", failing_in_turn) as replica:
        await replica.say(step="serving", state="READY", version=None, serving=True, path="old")
        updates = await reload(servers, fresh, "bad")

    assert updates[-1].progress == "rolled_back"
    assert (updates[-1].rollback_version, updates[-1].reason) == (2, "r1: no such directory")
    assert [command.version for command in replica.commands] == [1, 2]


async def test_a_rollback_brings_back_what_was_there_before(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh) as replica:
        with pytest.raises(NothingBefore):
            await anext(rollback_model(servers, topic_prefix=fresh))
        await reload(servers, fresh, "/one")
        await reload(servers, fresh, "/two")
        back = [update async for update in rollback_model(servers, topic_prefix=fresh, timeout=patient(30))]

    assert back[-1].ok
    assert [(command.path, command.fallback) for command in replica.commands] == [
        ("/one", None),
        ("/two", "/one"),
        ("/one", "/two"),
    ]


async def test_a_command_that_expects_another_one_is_not_written(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh) as replica:
        await reload(servers, fresh, expected_version=0)
        with pytest.raises(UnexpectedVersion, match="Version 1 of default is in force, not 0"):
            await reload(servers, fresh, expected_version=0)
        await reload(servers, fresh, expected_version=1)

    assert [command.version for command in replica.commands] == [1, 2]


async def test_a_stuck_replica_runs_into_the_timeout(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1"), Replica(servers, fresh, "stuck", silent):
        updates = [u async for u in reload_model(servers, "/m", topic_prefix=fresh, timeout=patient(2.0))]

    assert updates[-1].progress == "timeout"
    assert [r.answered for r in updates[-1].replicas] == [True, False]


async def test_without_replicas_the_command_is_written_and_said_so(servers: str, fresh: str) -> None:
    updates = [u async for u in reload_model(servers, "/m", topic_prefix=fresh, timeout=patient(1.0))]
    later = [u async for u in reload_model(servers, "/m", topic_prefix=fresh, timeout=patient(1.0))]

    assert [u.progress for u in updates] == ["running", "no_replicas"]
    assert later[-1].version == 2


async def test_garbage_on_the_control_topic_does_not_stop_a_reload(servers: str, fresh: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    for topic in ("control", "status"):
        for value in (b"\xff", b"[]", b'{"alias": 1}', None):
            await producer.send_and_wait(f"{fresh}.{topic}", value, key=b"default", partition=0)
    await producer.stop()

    async with Replica(servers, fresh):
        assert (await reload(servers, fresh))[-1].ok


async def test_of_two_writers_one_is_told_that_it_lost(
    servers: str, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = control.write_record
    rival = Control(alias="default", version=1, path="/rival", command_id="rival")

    async def beaten(where: Any, topic: str, command: Control, timeout: float) -> int:
        """Both have read the topic to its end before either writes: the rival's record comes in between."""
        await write(where, topic, rival, timeout)
        return await write(where, topic, command, timeout)

    monkeypatch.setattr(control, "write_record", beaten)
    async with Replica(servers, fresh) as replica:
        with pytest.raises(LostRace):
            await reload(servers, fresh)

        assert replica.commands[0].command_id == "rival"


async def test_status_shows_live_replicas_and_what_waits(servers: str, fresh: str) -> None:
    async with Replica(servers, fresh, "r1"), EmbedClient(servers, topic_prefix=fresh) as client:
        for _ in range(3):
            await client.submit("waits")
        async with Replica(servers, fresh, "r2"):
            pass  # stopped again
        found = await service_status(servers, topic_prefix=fresh)

    assert [r.replica for r in found.replicas] == ["r1"]
    assert found.replicas[0].state == "READY"
    assert {lane.topic: lane.jobs for lane in found.lag} == {f"{fresh}.jobs": 0, f"{fresh}.jobs.bulk": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": ""},
        {"path": "/m", "digest": "md5:1"},
        {"path": "/m", "policy": "fast"},
        {"path": "/m", "quantization": "int4"},
        {"path": "/m", "golden": ""},
        {"path": "/m", "golden_min_cosine": -2},
        {"path": "/m", "min_dimensions": 0},
        {"path": "/m", "expected_version": -1},
        {"path": "/m", "max_unavailable": 0},
        {"path": "/m", "max_unavailable": "half"},
        {"path": "/m", "min_cosine": 2},
        {"path": "/m", "timeout": 0},
        {"path": "/m", "alias": ""},
    ],
)
async def test_a_wrong_command_is_never_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await anext(reload_model("127.0.0.1:1", **wrong))

    assert raised.value.argument in wrong


async def test_a_missing_control_topic_is_named(servers: str) -> None:
    with pytest.raises(TopicMissing, match=r"nowhere\.control"):
        await anext(reload_model(servers, "/m", topic_prefix="nowhere"))


async def test_topics_are_created_once_and_differences_are_told(servers: str) -> None:
    name = f"top-{uuid.uuid4().hex[:8]}"

    first = await create_topics(servers, prefix=name, partitions=3, reply_partitions=2)
    second = await create_topics(servers, prefix=name, partitions=3, reply_partitions=2)
    other = await create_topics(servers, prefix=name, partitions=5, reply_partitions=2)

    assert all(report.created and not report.differences for report in first)
    assert all(not report.created and not report.differences for report in second)
    counts = {report.name.removeprefix(f"{name}."): report.partitions for report in first}
    assert counts == {
        "jobs": 3,
        "jobs.bulk": 3,
        "results": 3,
        "replies": 2,
        "control": 1,
        "status": 1,
        "dlq": 3,
        "retry.1": 3,
        "retry.2": 3,
    }
    assert {d for report in other for d in report.differences} == {"has 3 partitions, not 5"}


async def test_a_record_that_its_producer_stamped_long_ago_is_kept_as_long_as_any(servers: str) -> None:
    name = f"top-{uuid.uuid4().hex[:8]}"
    await create_topics(servers, prefix=name, partitions=1, reply_partitions=1)
    topics = Topics(name)
    before = time.time()
    async with AIOKafkaProducer(bootstrap_servers=servers) as client:
        for topic in (topics.jobs, topics.bulk, topics.results, topics.replies, topics.retry(1)):
            sent = await client.send_and_wait(topic, b"{}", timestamp_ms=1000)
            assert sent.timestamp / 1000 >= before - 1, f"{topic}: Kafka would delete it by its age"
        letter = await client.send_and_wait(topics.dead_letters, b"{}", timestamp_ms=1000)
        assert letter.timestamp == 1000, (
            "a dead letter keeps its record's timestamp; its topic deletes nothing by age"
        )


async def test_more_copies_than_brokers_is_an_argument_error(servers: str) -> None:
    with pytest.raises(InvalidArgument, match="`replication`"):
        await create_topics(servers, prefix=f"top-{uuid.uuid4().hex[:8]}", replication=50)
