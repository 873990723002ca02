"""One broker of three is lost for good, and with it the only copy of one caller's reply topic."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiokafka.admin import NewTopic
from aiokafka.admin.client import AIOKafkaAdminClient

from embedq_shared.headers import value_of
from tests.helpers.cluster import Cluster
from tests.helpers.delivery import until_committed
from tests.helpers.neighbors import assert_served, neighbors
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]

LOST = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three brokers, of this module alone."""
    with Cluster() as running:
        yield running


async def test_a_reply_topic_without_a_leader_costs_its_own_jobs_alone(
    cluster: Cluster, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    topics = await make_topics(cluster, fresh_prefix(), copies=3)
    lonely = f"{fresh_prefix()}.lonely"
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.kafka_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(lonely, -1, -1, replica_assignments={0: [LOST]})])
    finally:
        await admin.close()
    replica = Replica(cluster, topics, models / "a", tmp_path / "log", reply_timeout_s=8, reply_topics="*")
    async with replicas(replica):
        async with (
            reader(cluster, topics.dead_letters) as letters,
            neighbors(cluster, topics) as others,
        ):
            await others.progress(50)
            await asyncio.to_thread(cluster.stop_kafka, LOST, kill=True)
            await others.progress(200)
            await others.catch_up()  # what it led has other leaders now
            begun = time.monotonic()
            async with producer(cluster) as client:
                for number in range(20):
                    await client.send_and_wait(
                        topics.jobs,
                        json.dumps({"id": f"guilty-{number}", "input": f"guilty {number}"}).encode(),
                        headers=[("reply-topic", lonely.encode())],
                    )
            found = await letters.until(20)
            await others.progress(20)
        await until_committed(cluster, topics)
        assert replica.returncode is None
        assert await replica.stop() == 0

    reasons = {value_of(letter.headers, "embedq-error-message") for letter in found}
    assert all(b"LEADER_NOT_AVAILABLE" in (reason or b"") for reason in reasons), reasons
    codes = {value_of(letter.headers, "embedq-error-code") for letter in found}
    assert codes == {b"undeliverable"}
    assert_served(others, begun, record_property)
