"""Transactions that the group fences, on a real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient

from embedq_sdk.dev import DevStack
from embedq_shared.kafka import (
    FencedMember,
    FencedProducer,
    MemberFenced,
    Membership,
    OffsetAndMetadata,
    stable_offsets,
)
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient


@asynccontextmanager
async def _producer(stack: DevStack, name: str) -> AsyncIterator[FencedProducer]:
    producer = FencedProducer(
        bootstrap_servers=stack.kafka_servers,
        retries=True,
        ack_timeout_ms=3_000,
        transactional_id=name,
        transaction_timeout_ms=10_000,
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@asynccontextmanager
async def _member(
    stack: DevStack, group: str, topic: str
) -> AsyncIterator[tuple[AIOKafkaConsumer, FencedMember]]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=stack.kafka_servers, group_id=group)
    await consumer.start()
    try:
        async with asyncio.timeout(patient(20)):
            while not consumer.assignment():
                await consumer.getmany(timeout_ms=50)
        coordinator = consumer._coordinator
        yield (
            consumer,
            FencedMember(group=group, membership=Membership(coordinator.member_id, coordinator.generation)),
        )
    finally:
        await consumer.stop()


@asynccontextmanager
async def _client(stack: DevStack) -> AsyncIterator[AIOKafkaClient]:
    client = AIOKafkaClient(bootstrap_servers=stack.kafka_servers)
    await client.bootstrap()
    try:
        yield client
    finally:
        await client.close()


async def test_offsets_are_committed_with_the_results_of_a_transaction(stack: DevStack) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    group, jobs = f"{topics.prefix}.g", topics.lanes[1]
    place = TopicPartition(jobs, 0)
    async with (
        _member(stack, group, jobs) as (_, member),
        _producer(stack, f"{group}.one") as producer,
        _client(stack) as client,
    ):
        producer.member = member
        await producer.begin_transaction()
        sent = await producer.send(topics.results, b"result", partition=0)
        await producer.flush()
        await sent
        await producer.send_offsets_to_transaction({place: 7}, group)
        await producer.commit_transaction()
        assert await stable_offsets(client, group, [place]) == {place: OffsetAndMetadata(7, "")}


async def test_a_member_of_an_older_generation_cannot_commit(stack: DevStack) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=2)
    group, jobs = f"{topics.prefix}.g", topics.lanes[1]
    place = TopicPartition(jobs, 0)
    async with (
        _member(stack, group, jobs) as (_, member),
        _producer(stack, f"{group}.one") as producer,
        _client(stack) as client,
    ):
        producer.member = FencedMember(
            group=group,
            membership=Membership(member.membership.member_id, member.membership.generation - 1),
        )
        await producer.begin_transaction()
        await (await producer.send(topics.results, b"result", partition=0))
        with pytest.raises(MemberFenced):
            await producer.send_offsets_to_transaction({place: 7}, group)
        await producer.abort_transaction()
        assert await stable_offsets(client, group, [place]) == {place: None}
        # the producer goes on
        producer.member = member
        await producer.begin_transaction()
        await producer.send_offsets_to_transaction({place: 8}, group)
        await producer.commit_transaction()
        assert await stable_offsets(client, group, [place]) == {place: OffsetAndMetadata(8, "")}


async def test_offsets_are_read_only_after_an_open_transaction_has_ended(stack: DevStack) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    group, jobs = f"{topics.prefix}.g", topics.lanes[1]
    place = TopicPartition(jobs, 0)
    async with (
        _member(stack, group, jobs) as (_, member),
        _producer(stack, f"{group}.one") as producer,
        _client(stack) as client,
    ):
        producer.member = member
        await producer.begin_transaction()
        await (await producer.send(topics.results, b"result", partition=0))
        await producer.send_offsets_to_transaction({place: 7}, group)
        reading = asyncio.create_task(stable_offsets(client, group, [place]))
        done, _ = await asyncio.wait([reading], timeout=0.5)
        assert not done, "the offset was read while a transaction could still change it"
        await producer.commit_transaction()
        assert await reading == {place: OffsetAndMetadata(7, "")}
