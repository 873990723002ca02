"""The cluster that tests of faults run on: it survives what they do to it, and is what it says it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from embedq_shared.kafka import stop_client
from tests.helpers.cluster import Cluster
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(240)]


async def append(servers: str, topic: str, *values: bytes, within: float = 60.0) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=servers, acks="all", enable_idempotence=True, request_timeout_ms=int(patient(5_000))
    )
    try:
        async with asyncio.timeout(patient(within)):
            await producer.start()
            for value in values:
                await producer.send_and_wait(topic, value, partition=0)
    finally:
        await stop_client(producer, 5)  # by itself it would wait for a broker that is gone


async def read(servers: str, topic: str, count: int) -> list[bytes]:
    async with AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        async with asyncio.timeout(patient(60)):
            return [(await consumer.getone()).value for _ in range(count)]


async def leader(cluster: Cluster, topic: str) -> int:
    found = -1

    async def is_known() -> bool:
        """A broker other than the one that made the topic may not have heard of it yet."""
        nonlocal found
        found = _leader_of_first(await admin.describe_topics([topic]))
        return found >= 0

    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.direct_servers)
    await admin.start()
    try:
        await wait_until(is_known, what=f"a leader of {topic}")
        return found
    finally:
        await admin.close()


async def test_clients_are_led_through_the_proxies_and_onlookers_past_them(cluster: Cluster) -> None:
    topics = await make_topics(cluster, fresh_prefix(), copies=3)
    accepted = {node: proxy.accepted for node, proxy in cluster.proxies.items()}
    await append(cluster.direct_servers, topics.results, b"one")
    assert {node: proxy.accepted for node, proxy in cluster.proxies.items()} == accepted
    await append(cluster.kafka_servers, topics.results, b"two")
    node = await leader(cluster, topics.results)
    assert cluster.proxies[node].accepted > accepted[node]
    assert await read(cluster.direct_servers, topics.results, 2) == [b"one", b"two"]


async def test_a_killed_leader_is_replaced_and_comes_back_with_its_data(cluster: Cluster) -> None:
    topics = await make_topics(cluster, fresh_prefix(), copies=3)
    await append(cluster.kafka_servers, topics.results, b"one")
    node = await leader(cluster, topics.results)
    await asyncio.to_thread(cluster.stop_kafka, node, kill=True)
    await append(cluster.kafka_servers, topics.results, b"two")
    assert await leader(cluster, topics.results) != node
    await asyncio.to_thread(cluster.start_kafka, node)
    await append(cluster.kafka_servers, topics.results, b"three")
    assert await read(cluster.kafka_servers, topics.results, 3) == [b"one", b"two", b"three"]


async def test_a_frozen_leader_is_replaced_and_follows_when_it_goes_on(cluster: Cluster) -> None:
    topics = await make_topics(cluster, fresh_prefix(), copies=3)
    await append(cluster.kafka_servers, topics.results, b"one")
    node = await leader(cluster, topics.results)
    await asyncio.to_thread(cluster.pause_kafka, node)
    try:

        async def replaced() -> bool:
            other = next(each for each in cluster.nodes if each != node)
            return await _leader_by(cluster, other, topics.results) not in (node, -1)

        await wait_until(replaced, within=60, what="another leader")
    finally:
        await asyncio.to_thread(cluster.resume_kafka, node)
    await append(cluster.kafka_servers, topics.results, b"two")
    assert await read(cluster.kafka_servers, topics.results, 2) == [b"one", b"two"]


async def test_a_cut_proxy_hides_a_broker_from_clients_and_from_nobody_else(cluster: Cluster) -> None:
    topics = await make_topics(cluster, fresh_prefix(), copies=3)
    node = await leader(cluster, topics.results)
    cluster.proxies[node].cut()
    try:
        with pytest.raises((KafkaError, TimeoutError, OSError)):
            await append(cluster.kafka_servers, topics.results, b"never", within=5)
        assert await leader(cluster, topics.results) == node
        await append(cluster.direct_servers, topics.results, b"one")
    finally:
        cluster.heal()
    await append(cluster.kafka_servers, topics.results, b"two")
    assert await read(cluster.kafka_servers, topics.results, 2) == [b"one", b"two"]


async def test_a_topic_comes_into_being_by_being_asked_for(cluster: Cluster) -> None:
    topic = f"{fresh_prefix()}.made-by-accident"
    await append(cluster.kafka_servers, topic, b"one")
    assert await read(cluster.kafka_servers, topic, 1) == [b"one"]


async def test_groups_and_transactions_outlive_any_one_broker(cluster: Cluster) -> None:
    """Their topics have three copies, whose loss of one stops nobody."""
    topic = f"{fresh_prefix()}.anything"
    await append(cluster.kafka_servers, topic, b"one")
    async with (
        AIOKafkaProducer(
            bootstrap_servers=cluster.kafka_servers, transactional_id=fresh_prefix()
        ) as producer,
        producer.transaction(),
    ):
        await producer.send_and_wait(topic, b"two")
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.direct_servers)
    await admin.start()
    try:
        described = await admin.describe_topics(["__consumer_offsets", "__transaction_state"])
    finally:
        await admin.close()
    assert [len(p["replicas"]) for found in described for p in found["partitions"]] == [3, 3]


def test_redis_is_behind_a_proxy_too(cluster: Cluster) -> None:
    import redis

    with redis.Redis.from_url(cluster.redis_url, socket_timeout=patient(2)) as client:
        assert client.ping()
        cluster.redis_proxy.half_open()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        with redis.Redis.from_url(cluster.direct_redis_url, socket_timeout=patient(2)) as onlooker:
            assert onlooker.ping()
        cluster.heal()
        assert client.ping()


async def _leader_by(cluster: Cluster, node: int, topic: str) -> int:
    """The leader of the first partition, by what one broker knows."""
    address = cluster.direct_servers.split(",")[node - 1]
    client = AIOKafkaAdminClient(bootstrap_servers=address, request_timeout_ms=int(patient(2_000)))
    try:
        await client.start()
        return _leader_of_first(await client.describe_topics([topic]))
    except (KafkaError, TimeoutError, OSError):
        return -1
    finally:
        await client.close()


def _leader_of_first(described: list[dict[str, Any]]) -> int:
    """Partitions come in any order; -1 where the first is not among them."""
    leaders = {found["partition"]: int(found["leader"]) for found in described[0]["partitions"]}
    return leaders.get(0, -1)
