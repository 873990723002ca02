"""The reader of the control and status topics over a consumer in memory: whose silence it is."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiokafka import TopicPartition

from embedq_sdk.admin import control
from embedq_sdk.admin.control import ControlPlaneReader
from embedq_sdk.errors import KafkaUnavailable
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_shared.kafka import KafkaOptions
from embedq_shared.topics import Topics

TOPICS = Topics("t")
NOW = 1_000_000.0
"""Epoch seconds."""


def stand_still(seconds: float) -> None:
    """Nothing else runs in this event loop meanwhile."""
    time.sleep(seconds)


class Consumer:
    """Has no records. A fetch of it is answered whenever the test says so."""

    def __init__(self) -> None:
        self.answered_ms: int | None = None
        self.stands_still_s = 0.0

    def assign(self, partitions: list[TopicPartition]) -> None: ...

    async def seek_to_beginning(self, *partitions: TopicPartition) -> None: ...

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def position(self, partition: TopicPartition) -> int:
        return 0

    def last_poll_timestamp(self, partition: TopicPartition) -> int | None:
        return self.answered_ms

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        # Not in here: that a call of ours blocks the loop is another fault than the one this is about.
        asyncio.get_running_loop().call_soon(time.sleep, self.stands_still_s)
        self.stands_still_s = 0.0
        await asyncio.sleep(0.01)
        return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_TURN_S", 0.2)
    monkeypatch.setattr(control, "_SILENCE_S", 0.5)


async def opened() -> tuple[ControlPlaneReader, Consumer]:
    consumer: Any = Consumer()
    reader = ControlPlaneReader(KafkaConnection(KafkaOptions(servers="a:1")), consumer, TOPICS)
    assert await reader.read_to_end([TOPICS.control, TOPICS.status]) == []
    return reader, consumer


async def test_kafka_is_not_charged_for_an_event_loop_that_stood_still() -> None:
    reader, consumer = await opened()
    consumer.answered_ms = 1
    await reader.poll()
    consumer.stands_still_s = 1.0
    await reader.poll()
    consumer.answered_ms = 2  # what came meanwhile is seen a turn later
    await reader.poll()


async def test_kafka_is_not_charged_for_what_our_caller_does_with_an_update() -> None:
    reader, consumer = await opened()
    consumer.answered_ms = 1
    for _ in range(5):
        await reader.poll()
        stand_still(0.3)


@pytest.mark.parametrize("answered_ms", [1, None], ids=["it was heard before", "it was never heard"])
async def test_a_broker_that_answers_no_fetch_is_gone(answered_ms: int | None) -> None:
    reader, consumer = await opened()
    consumer.answered_ms = answered_ms

    async def follow() -> None:
        while True:
            await reader.poll()

    with pytest.raises(KafkaUnavailable, match=r"nothing came for 0\.5 s"):
        await asyncio.wait_for(follow(), 60)


async def test_the_statuses_were_heard_up_to_the_last_answer_to_a_fetch() -> None:
    reader, consumer = await opened()
    assert reader.heard(NOW) == NOW, "nothing is known of it"
    consumer.answered_ms = int((NOW - 3) * 1000)
    await reader.poll()
    assert reader.heard(NOW) == NOW - 3
    assert reader.heard(NOW - 5) == NOW - 5, "clocks that were set back"
