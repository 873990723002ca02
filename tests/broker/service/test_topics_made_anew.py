"""A jobs topic that is deleted and made again while jobs of it are in flight: the new topic's jobs are all answered."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.errors import for_code

from embedq_consumer.group.topic_watch import topic_id_of
from embedq_sdk.dev import DevStack
from embedq_shared.kafka import AIOKafkaConsumer
from tests.helpers.delivery import (
    Answered,
    administering,
    long_job,
    preload,
    short_job,
    until_committed,
    until_it_logged,
)
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

_JOBS = 30


def _new(number: int) -> dict[str, Any]:
    return short_job(number) | {"id": f"new-{number}"}


async def _make_anew(admin: AIOKafkaAdminClient, topic: str, partitions: int) -> None:
    response = await admin.delete_topics([topic])
    assert [code for _, code in response.topic_error_codes] == [0]

    async def made() -> bool:
        answer = await admin.create_topics([NewTopic(topic, partitions, 1)])
        [code] = [code for _, code, *_ in answer.topic_errors]
        assert code in (0, 36), for_code(code)  # 36: it is not gone yet
        return bool(code == 0)

    await wait_until(made, what="the new topic")


@pytest.mark.parametrize(
    ("lane", "settings"),
    [
        ("jobs", {}),
        ("bulk", {}),
        ("bulk", {"bulk_delivery": "exactly-once"}),
    ],
    ids=["interactive", "bulk", "exactly-once"],
)
async def test_each_job_of_the_new_topic_is_answered_although_jobs_of_the_old_one_were_in_flight(
    stack: DevStack, models: Path, tmp_path: Path, lane: str, settings: dict[str, Any]
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    topic = getattr(topics, lane)
    group = f"{topics.prefix}.embedq"
    await preload(stack, topic, 400, long_job)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False, **settings)
    committed = settings != {}
    async with (
        replicas(replica),
        reader(stack, topics.results, committed=committed) as results,
        administering(stack) as admin,
    ):
        answered = Answered(results)
        await answered.some(_JOBS + 10)
        assert len(await answered.all()) < 400 - _JOBS, "there is nothing in flight any more"
        await _make_anew(admin, topic, 1)
        wanted = await preload(stack, topic, _JOBS, _new)
        await answered.until(wanted)
        await until_committed(stack, topics)
        [stored] = [
            its
            for partition, its in (await admin.list_consumer_group_offsets(group)).items()
            if partition.topic == topic
        ]
        if not committed:
            assert stored.offset == _JOBS
        assert topic_id_of(stored.metadata)
        assert (await replica.metrics())["embedq_topics_remade_total"] == 1
        assert [event["topic"] for event in replica.events() if event["event"] == "topic_made_anew"] == [
            topic
        ]
        await answered.all()
        if committed:
            counts = answered.counts()
            assert {job: counts[job] for job in wanted} == Counter(wanted)
        assert await replica.stop() == 0


@pytest.mark.parametrize("settings", [{}, {"bulk_delivery": "exactly-once"}], ids=["bulk", "exactly-once"])
async def test_a_replica_that_sleeps_while_the_new_topic_grows_longer_than_the_old_one_was_skips_none_of_it(
    stack: DevStack, models: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Where it would read on lies in the middle of the new topic, and nothing is out of range."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    old = await preload(stack, topics.bulk, _JOBS, long_job)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False, **settings)
    async with (
        replicas(replica),
        reader(stack, topics.results, committed=settings != {}) as results,
        administering(stack) as admin,
    ):
        answered = Answered(results)
        await answered.some(1)
        replica.kill(signal.SIGSTOP)
        try:
            await _make_anew(admin, topics.bulk, 1)
            wanted = await preload(stack, topics.bulk, 2 * _JOBS, _new)
        finally:
            replica.kill(signal.SIGCONT)
        await answered.until(wanted)
        await until_committed(stack, topics)
        assert await replica.stop() == 0
        await answered.all()
    if settings:
        counts = answered.counts()
        assert {job: counts[job] for job in wanted} == Counter(wanted)
        assert max(counts[job] for job in old) == 1


async def test_a_topic_made_anew_while_no_replica_runs_begins_at_its_beginning(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    wanted = await preload(stack, topics.jobs, 5)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    async with replicas(replica), reader(stack, topics.results) as results, administering(stack) as admin:
        answered = Answered(results)
        await answered.until(wanted)
        await until_committed(stack, topics)
        assert await replica.stop() == 0
        await _make_anew(admin, topics.jobs, 1)
        new = await preload(stack, topics.jobs, 3, _new)
        await replica.start()
        await answered.until(new)
        await until_committed(stack, topics)


async def test_jobs_that_kafka_deleted_unread_are_told_and_the_rest_is_answered(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    wanted = await preload(stack, topics.jobs, 2)
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    async with replicas(replica), reader(stack, topics.results) as results, administering(stack) as admin:
        answered = Answered(results)
        await answered.until(wanted)
        await until_committed(stack, topics)
        assert await replica.stop() == 0
        new = await preload(stack, topics.jobs, 5, _new)
        await admin.delete_records({TopicPartition(topics.jobs, 0): RecordsToDelete(before_offset=5)})
        await replica.start()
        await answered.until(new[3:])
        await until_it_logged(replica, "records_deleted_unread")
        [told] = [event for event in replica.events() if event["event"] == "records_deleted_unread"]
        assert (told["topic"], told["first_offset"], told["records"]) == (topics.jobs, 2, 3)


async def test_a_broker_deletes_the_offsets_of_a_topic_with_it_and_takes_late_ones_for_the_new_one(
    stack: DevStack,
) -> None:
    """What Kafka itself does, on which all of this rests: the late commit would be the trap."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    await preload(stack, topics.jobs, 30)
    partition, group = TopicPartition(topics.jobs, 0), f"{topics.prefix}.plain"
    # embedq's own client: aiokafka's asks for the topic while it is away, and the broker makes it for asking.
    consumer = AIOKafkaConsumer(
        bootstrap_servers=stack.kafka_servers, group_id=group, enable_auto_commit=False
    )
    await consumer.start()
    try:
        consumer.assign([partition])
        await consumer.commit({partition: 30})
        async with administering(stack) as admin:
            await _make_anew(admin, topics.jobs, 1)

            async def forgotten() -> bool:
                found = await admin.list_consumer_group_offsets(group, partitions=[partition])
                return bool(found[partition].offset == -1)

            await wait_until(forgotten, what="a deleted offset")
            await consumer.commit({partition: 30})
            found = await admin.list_consumer_group_offsets(group, partitions=[partition])
            assert found[partition].offset == 30
    finally:
        await consumer.stop()
