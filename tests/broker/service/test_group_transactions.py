"""The group's member on a real Kafka: transactions that the group fences, and how a member leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient

from embedq_sdk.dev import DevStack
from embedq_shared.kafka import (
    FencedMember,
    FencedProducer,
    GroupMember,
    GroupMemberOptions,
    MemberFenced,
    Membership,
    OffsetAndMetadata,
    stable_offsets,
)
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until


@asynccontextmanager
async def _producer(stack: DevStack, name: str) -> AsyncIterator[FencedProducer]:
    producer = FencedProducer(
        bootstrap_servers=stack.kafka_servers,
        retries=True,
        ack_timeout_ms=int(patient(3_000)),
        transactional_id=name,
        transaction_timeout_ms=int(patient(10_000)),
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


class _Told:
    """What a member's follower hears."""

    def __init__(self) -> None:
        self.assignments: list[frozenset[TopicPartition]] = []

    def claim(self) -> bytes:
        return b""

    def share(
        self, partitions: Mapping[str, Sequence[int]], members: Mapping[str, tuple[Collection[str], bytes]]
    ) -> Mapping[str, tuple[Collection[TopicPartition], bytes]]:
        places = [
            TopicPartition(topic, number) for topic, numbers in partitions.items() for number in numbers
        ]
        return dict.fromkeys(members, (places, b""))

    def assigned(
        self, membership: Membership, partitions: frozenset[TopicPartition], user_data: bytes
    ) -> None:
        self.assignments.append(partitions)

    def expelled(self) -> None:
        raise AssertionError("a member that leaves was expelled")


async def test_a_member_whose_heartbeat_hears_first_that_it_left_does_not_join_again(stack: DevStack) -> None:
    """It would be given partitions that it never reads, and the group would wait for its session to end."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    options = GroupMemberOptions(
        group=f"{topics.prefix}.g",
        client_id="leaver",
        static=False,
        session_timeout_ms=int(patient(10_000)),
        rebalance_timeout_ms=int(patient(10_000)),
        heartbeat_ms=20,
    )
    member, told = GroupMember({"bootstrap_servers": stack.kafka_servers}, options), _Told()
    await member.start()
    member.join([topics.jobs], told)
    await wait_until(lambda: bool(told.assignments), what="the first assignment")
    coordinator: Any = member._coordinator
    heard = coordinator.ask

    async def ask_and_dawdle(request: Any) -> Any:
        answer = await heard(request)
        # Until a heartbeat was told that the group does not know this member.
        await wait_until(lambda: coordinator.generation < 0, what="the heartbeat")
        await wait_until(
            lambda: coordinator._coordination_task.done() or len(told.assignments) > 1,
            what="what comes of it",
        )
        return answer

    coordinator.ask = ask_and_dawdle
    assert await member.close(patient(10)) is None
    assert told.assignments == [frozenset({TopicPartition(topics.jobs, 0)})]
