"""What a broker says of a group's commits in the moment in which it has become the group's coordinator.

A coordinator of Kafka 4 that has read its log to the end answers with what lies below the log's high watermark, and a new
leader's lies behind until the other copies have asked it for more. So an offset that was committed and acknowledged may be
missing from an answer, and be there again in the next one, without anybody having committed anything. A run of the mix
showed it once. The group's log never goes back; and a question that waits for what is not settled, which is how a worker
asks where to begin (KIP-447, `StableOffsets`), is answered only when it is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from embedq_shared.kafka import (
    AIOKafkaAdminClient,
    ConsumerRecord,
    GroupMember,
    GroupMemberOptions,
    KafkaError,
    Membership,
    OffsetAndMetadata,
    TopicPartition,
)
from tests.faults.group_log import TOPIC, stored_by
from tests.faults.observer import LogReader
from tests.helpers.cluster import Cluster
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.soak, pytest.mark.timeout(300)]

GROUP = "stale"
FIRST, SECOND = 10, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Copies learn of the high watermark with the next record or after 20 s; a frozen broker counts as alive for a minute."""
    slow = {
        "replica.fetch.wait.max.ms": "20000",
        "replica.socket.timeout.ms": "60000",
        "replica.lag.time.max.ms": "90000",
        "broker.session.timeout.ms": "60000",
    }
    with Cluster(properties=slow) as running:
        yield running


class Follower:
    """A member to whom partitions are nothing."""

    def __init__(self) -> None:
        self.memberships: list[Membership] = []

    def claim(self) -> bytes:
        return b""

    def share(
        self, partitions: object, members: dict[str, object]
    ) -> dict[str, tuple[set[TopicPartition], bytes]]:
        return {member: (set(), b"") for member in members}

    def assigned(self, membership: Membership, partitions: object, user_data: bytes) -> None:
        self.memberships.append(membership)

    def expelled(self) -> None: ...


@asynccontextmanager
async def joined(cluster: Cluster, topic: str) -> AsyncIterator[tuple[GroupMember, Membership]]:
    options = GroupMemberOptions(
        group=GROUP,
        client_id="r",
        static=False,
        session_timeout_ms=120_000,
        rebalance_timeout_ms=120_000,
        heartbeat_ms=300,
    )
    member, follower = GroupMember({"bootstrap_servers": cluster.direct_servers}, options), Follower()
    await member.start()
    try:
        member.join([topic], follower)  # type: ignore[arg-type]
        await wait_until(lambda: bool(follower.memberships), what="the membership")
        yield member, follower.memberships[-1]
    finally:
        await member.close(5)


async def the_log(cluster: Cluster) -> dict[str, Any]:
    """Its leader and its copies, as the brokers have them now."""
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.direct_servers)
    await admin.start()
    try:
        [described] = await admin.describe_topics([TOPIC])
    finally:
        await admin.close()
    [partition] = described["partitions"]
    return dict(partition)


async def copies_of_the_log(cluster: Cluster) -> list[int]:
    """The brokers that have it: first the leader, which is the coordinator, then the one that follows it in this office. The
    last one was started anew, so that another one is the cluster's controller: frozen, this one would keep all from it."""
    found = await the_log(cluster)
    leader: int = found["leader"]
    copies = [leader, *(node for node in found["replicas"] if node != leader)]
    await asyncio.to_thread(cluster.stop_kafka, copies[-1])
    await asyncio.to_thread(cluster.start_kafka, copies[-1])

    async def whole() -> bool:
        now = await the_log(cluster)
        return now["leader"] == leader and len(now["isr"]) == len(copies)

    await wait_until(whole, within=60, what="all copies of the log")
    return copies


async def asked_plainly(cluster: Cluster, node: int, partition: TopicPartition) -> int:
    """What this broker says was committed, as soon as it says anything."""
    admin = AIOKafkaAdminClient(bootstrap_servers=address(cluster, node), request_timeout_ms=10_000)
    answers: list[int] = []

    async def answered() -> bool:
        with suppress(KafkaError):
            found = await admin.list_consumer_group_offsets(GROUP, node, [partition])
            answers.extend(stored.offset for stored in found.values())
        return bool(answers)

    await admin.start()
    try:
        await wait_until(answered, within=60, what="an answer of the new coordinator")
    finally:
        await admin.close()
    return answers[0]


def address(cluster: Cluster, node: int) -> str:
    return cluster.direct_servers.split(",")[node - 1]


async def asked_as_workers_do(member: GroupMember, partition: TopicPartition) -> int:
    """As often as it takes."""
    while True:
        try:
            stored = (await member.committed([partition]))[partition]
        except KafkaError:
            await asyncio.sleep(0.1)
        else:
            assert stored is not None
            return int(stored.offset)


async def test_a_new_coordinator_may_forget_a_commit_for_a_moment_and_neither_a_worker_nor_the_log_does(
    cluster: Cluster,
) -> None:
    topics = await make_topics(cluster, fresh_prefix(), partitions=1, copies=3)
    partition = TopicPartition(topics.jobs, 0)
    old, new, frozen = await copies_of_the_log(cluster)
    is_new_kind = int(cluster.kafka_description.split()[2].split(".")[0]) >= 4
    logged: list[int | None] = []

    def note(record: ConsumerRecord) -> None:
        stored = stored_by(record.key, record.value)
        if stored is not None and stored.group == GROUP:
            logged.append(stored.offset)

    async with joined(cluster, topics.jobs) as (member, membership):
        for offset in (FIRST, SECOND):
            assert not await member.commit(membership, {partition: OffsetAndMetadata(offset, "")})
        # From here on nothing is written to the log, so that its copies do not hear that the second one counts.
        await asyncio.to_thread(cluster.pause_kafka, frozen)
        try:
            await asyncio.to_thread(cluster.stop_kafka, old)
            said = await asked_plainly(cluster, new, partition)
            assert said == (FIRST if is_new_kind else SECOND)
            waiting = asyncio.create_task(asked_as_workers_do(member, partition))
            reader = LogReader(address(cluster, new), (TOPIC,), "exactly-once", note)
            reading = asyncio.create_task(reader.run())
            await wait_until(lambda: FIRST in logged, what="the first commit in the log")
            if is_new_kind:
                assert await asked_plainly(cluster, new, partition) == FIRST, "it was true before we looked"
                assert not waiting.done(), "a worker was told something that may be old"
                assert logged == [FIRST]
        finally:
            await asyncio.to_thread(cluster.resume_kafka, frozen)
            await asyncio.to_thread(cluster.start_kafka, old)
        assert await waiting == SECOND
        await wait_until(lambda: SECOND in logged, what="the second commit in the log")
        reading.cancel()
        await asyncio.wait({reading})
    assert logged == [FIRST, SECOND]
