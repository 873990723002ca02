"""A client whose reply topic is deleted while it is open: it goes on with the new one, or says what is wrong."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiokafka.admin import NewTopic

from embedq_sdk import EmbedClient, TopicMissing
from embedq_sdk.admin.topics import create_topics
from embedq_shared.kafka import AIOKafkaAdminClient, AIOKafkaProducer
from embedq_shared.topics import Topics
from tests.helpers.fake_service import expected
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

PARTITIONS = 3


@pytest.fixture
async def topics(servers: str) -> Topics:
    """Topics of one test alone, since it deletes one."""
    prefix = f"anew-{uuid.uuid4().hex[:8]}"
    await create_topics(servers, prefix=prefix, partitions=1, reply_partitions=PARTITIONS)
    return Topics(prefix)


@asynccontextmanager
async def administering(servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def delete(admin: AIOKafkaAdminClient, topic: str) -> None:
    response = await admin.delete_topics([topic])
    assert [code for _, code in response.topic_error_codes] == [0]


async def make(admin: AIOKafkaAdminClient, topic: str, partitions: int) -> None:
    async def made() -> bool:
        answer = await admin.create_topics([NewTopic(topic, partitions, 1)])
        [code] = [code for _, code, *_ in answer.topic_errors]
        assert code in (0, 36), code  # 36: the old one is not gone yet
        return bool(code == 0)

    await wait_until(made, what="the new topic")


async def fill(servers: str, topic: str, partitions: int, count: int) -> None:
    """So many records of somebody else on each partition."""
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
        for partition in range(partitions):
            await asyncio.gather(
                *[await producer.send(topic, b"x", partition=partition) for _ in range(count)]
            )


@pytest.mark.parametrize(
    "partitions", [PARTITIONS, 1, 2 * PARTITIONS], ids=["as many partitions", "fewer", "more"]
)
async def test_calls_under_way_and_later_ones_are_answered_in_the_new_topic(
    servers: str, topics: Topics, partitions: int
) -> None:
    async with (
        administering(servers) as admin,
        Responder(servers, topics.prefix) as responder,
        EmbedClient(servers, topic_prefix=topics.prefix, instance="the-same") as client,
    ):
        for n in range(5):
            assert np.array_equal(await client.embed(f"before {n}"), expected(f"before {n}"))
        responder.behave = lambda job: None
        under_way = [asyncio.create_task(client.embed(f"{n}", timeout=patient(90))) for n in range(3)]
        await wait_until(lambda: len(responder.received) == 5 + 3, what="the jobs")
        responder.behave = None
        await delete(admin, topics.replies)
        await make(admin, topics.replies, partitions)
        # Longer than the old one was, so that where the client stood is in the middle of it, and nothing out of range.
        await fill(servers, topics.replies, partitions, 50)

        for n, vector in enumerate(await asyncio.gather(*under_way)):
            assert np.array_equal(vector, expected(f"{n}"))
        assert client.reply_partition < partitions
        for n in range(5):
            vector = await client.embed(f"after {n}", timeout=patient(30))
            assert np.array_equal(vector, expected(f"after {n}"))
        assert client.in_flight == 0
        assert client.answering


async def test_while_there_is_no_reply_topic_calls_say_so_long_before_their_deadline(
    servers: str, topics: Topics
) -> None:
    async with (
        administering(servers) as admin,
        Responder(servers, topics.prefix) as responder,
        EmbedClient(servers, topic_prefix=topics.prefix) as client,
    ):
        await client.embed("before")
        responder.behave = lambda job: None
        await delete(admin, topics.replies)
        async with asyncio.timeout(patient(60)):
            with pytest.raises(TopicMissing, match=topics.replies):
                await client.embed("while it is away", timeout=3600)
            await client.submit("needs no reply")
        assert topics.replies not in await admin.list_topics(), "nobody made it by asking for it"
        responder.behave = None
        await make(admin, topics.replies, PARTITIONS)

        async def again() -> bool:
            try:
                return np.array_equal(await client.embed("after", timeout=patient(30)), expected("after"))
            except TopicMissing:
                return False

        await wait_until(again, within=60, what="an answer in the new topic")
