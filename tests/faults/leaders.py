"""The ends of partitions, asked of those who lead them now.

A broker that stood still for a while believes for a moment that it still leads what others have led since, and answers with
ends below which their records are missing; and it names itself to whoever asks it for the leader. So all brokers are asked, and the
highest leader epoch counts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import LeaderNotAvailableError

from embedq_shared.kafka import (
    AIOKafkaConsumer,
    KafkaConnectionError,
    KafkaError,
    TopicPartition,
)
from embedq_shared.kafka.requests import TopicIds

_EACH_S: Final = 0.5
"""For a broker's word on who leads. One that stands still says nothing."""
_PAUSE_S: Final = 0.1
_LATEST: Final = -1


def newest_leaders(answers: Iterable[Any]) -> dict[TopicPartition, int]:
    """Who leads each partition, by the highest epoch in these answers to `TopicIds`. Topics that nobody has are left out. Pure.

    Raises:
        LeaderNotAvailableError: nobody leads one of them now.
    """
    found: dict[TopicPartition, tuple[int, int]] = {}
    for answer in answers:
        for code, topic, _, _, partitions, *_ in answer.topics:
            if code:
                continue
            for _, number, leader, epoch, *_ in partitions:
                partition = TopicPartition(topic, number)
                found[partition] = max(found.get(partition, (-1, -1)), (epoch, leader))
    for partition, (_, leader) in found.items():
        if leader < 0:
            raise LeaderNotAvailableError(partition)
    return {partition: leader for partition, (_, leader) in found.items()}


async def ends_of(consumer: AIOKafkaConsumer, topics: Sequence[str]) -> dict[TopicPartition, int]:
    """The end of each partition, as its leader knows it. Asks again while leaders change.

    Raises:
        KafkaError: a broker says something else.
    """
    while True:
        try:
            return await _ends_by(consumer, newest_leaders(await _said_by_all(consumer._client, topics)))
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(_PAUSE_S)


async def _said_by_all(client: AIOKafkaClient, topics: Sequence[str]) -> list[Any]:
    """The answers of all brokers that give one in time."""
    asked = [
        asyncio.ensure_future(client.send(broker.nodeId, TopicIds(topics)))
        for broker in client.cluster.brokers()
    ]
    for one in asked:
        one.add_done_callback(_looked_at)
    done, late = await asyncio.wait(asked, timeout=_EACH_S) if asked else (set(), set())
    for one in late:
        one.cancel()
    if answers := [one.result() for one in done if one.exception() is None]:
        return answers
    client.force_metadata_update()
    raise KafkaConnectionError("no broker says who leads")


async def _ends_by(
    consumer: AIOKafkaConsumer, leaders: dict[TopicPartition, int]
) -> dict[TopicPartition, int]:
    by_leader: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for partition, leader in leaders.items():
        by_leader[leader][partition.topic].append((partition.partition, _LATEST))
    answers = await asyncio.gather(
        *(consumer._fetcher._proc_offset_request(leader, asked) for leader, asked in by_leader.items())
    )
    return {partition: end for answer in answers for partition, (end, _) in answer.items()}


def _looked_at(asked: asyncio.Future[Any]) -> None:
    """Nobody else may look at what it raised, of which asyncio would complain."""
    if not asked.cancelled():
        asked.exception()
