"""The reply reader over consumers in memory: its place, foreign records, broken connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError

from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport import reply_reader
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.reply_reader import ReplyReader
from embedq_shared.kafka import KafkaOptions, Unreadable
from tests.helpers.support import wait_until

PARTITIONS = 4


class Topic:
    """One topic in memory, for all consumers of a test."""

    def __init__(self) -> None:
        self.records: dict[int, list[bytes | None]] = {n: [] for n in range(PARTITIONS)}
        """None stands for a record that cannot be read."""


class Consumer:
    """Reads a `Topic`. An unreadable record comes with an `Unreadable` as its value."""

    def __init__(self, topic: Topic, *, knows_topic: bool = False) -> None:
        self._topic = topic
        self._known = knows_topic
        self.assigned: list[TopicPartition] = []
        self.at = 0
        self.broken = False
        self.failure = KafkaError("gone")
        self.stopped = False
        self.last_poll: int | None = None

    async def topics(self) -> set[str]:
        return {"replies", "jobs"}

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(range(PARTITIONS)) if self._known else None

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.assigned = partitions
        self.at = 0

    async def position(self, partition: TopicPartition) -> int:
        self._known = True
        return self.at

    async def seek_to_end(self, partition: TopicPartition) -> None:
        self.at = len(self._topic.records[partition.partition])

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert [partition] == self.assigned
        self.at = offset

    def last_poll_timestamp(self, partition: TopicPartition) -> int | None:
        return self.last_poll

    async def getmany(
        self, partition: TopicPartition, *, timeout_ms: int, max_records: int | None = None
    ) -> dict[TopicPartition, list[Any]]:
        await asyncio.sleep(0)
        if self.broken:
            raise self.failure
        found = self._topic.records[partition.partition][self.at : self.at + (max_records or 500)]
        records = [
            SimpleNamespace(
                topic=partition.topic,
                partition=partition.partition,
                offset=self.at + n,
                value=Unreadable(self.at + n, "why") if value is None else value,
            )
            for n, value in enumerate(found)
        ]
        self.at += len(found)
        return {partition: records} if records else {}

    async def stop(self) -> None:
        self.stopped = True


class Connection(KafkaConnection):
    def __init__(self, *consumers: Consumer | KafkaRefused | None) -> None:
        super().__init__(KafkaOptions(servers="a:1"))
        self._consumers = list(consumers)

    async def connect(self, make: Callable[[], Any], timeout: float) -> Any:
        await asyncio.sleep(0)
        consumer = self._consumers.pop(0)
        if consumer is None:
            raise self.unavailable("no answer")
        if isinstance(consumer, KafkaRefused):
            raise consumer
        return consumer


@asynccontextmanager
async def running(*consumers: Consumer | None) -> AsyncIterator[tuple[ReplyReader, list[bytes]]]:
    delivered: list[bytes] = []
    reader = ReplyReader(
        Connection(*consumers),
        "replies",
        lambda count: count - 1,
        lambda record: delivered.append(record.value),
        lambda error: None,
    )
    await reader.open(["jobs", "replies"], 1.0)
    task = asyncio.create_task(reader.run())
    try:
        yield reader, delivered
    finally:
        task.cancel()
        await asyncio.wait({task})
        await reader.close()


@pytest.mark.parametrize("knows_topic", [False, True])
async def test_only_what_comes_after_opening_is_delivered_in_order(knows_topic: bool) -> None:
    topic = Topic()
    topic.records[3] = [b"old"]
    consumer = Consumer(topic, knows_topic=knows_topic)
    async with running(consumer) as (reader, delivered):
        assert reader.partition == 3
        topic.records[3] += [b"one", b"two"]
        topic.records[0] += [b"another client's"]
        await wait_until(lambda: len(delivered) == 2)

        assert delivered == [b"one", b"two"]
    assert consumer.stopped


async def test_records_that_cannot_be_read_are_passed() -> None:
    topic = Topic()
    async with running(Consumer(topic)) as (_, delivered):
        topic.records[3] += [None, b"one", None, None, b"two", None]
        await wait_until(lambda: len(delivered) == 2)
        topic.records[3] += [b"three"]
        await wait_until(lambda: len(delivered) == 3)

        assert delivered == [b"one", b"two", b"three"]


async def test_a_new_consumer_goes_on_where_the_last_one_stopped() -> None:
    topic = Topic()
    first, second = Consumer(topic), Consumer(topic)
    async with running(first, None, second) as (reader, delivered):
        topic.records[3] += [b"one", None]
        await wait_until(lambda: delivered == [b"one"] and first.at == 2)
        first.broken = True
        await wait_until(lambda: first.stopped)
        topic.records[3] += [b"two"]
        await wait_until(lambda: len(delivered) == 2)

        assert delivered == [b"one", b"two"]
        assert reader.partition == 3


async def test_silence_is_measured_from_the_last_answer_to_a_fetch() -> None:
    topic = Topic()
    consumer = Consumer(topic)
    async with running(consumer) as (reader, _):
        assert reader.silent_for(100.0) == float("inf")
        consumer.last_poll = 98_000
        assert reader.silent_for(100.0) == 2.0
    assert reader.silent_for(100.0) == float("inf")


async def test_a_missing_topic_closes_the_connection_again() -> None:
    consumer = Consumer(Topic())
    reader = ReplyReader(
        Connection(consumer), "replies", lambda count: 0, lambda record: None, lambda error: None
    )
    with pytest.raises(TopicMissing, match="bulk"):
        await reader.open(["jobs", "bulk"], 1.0)

    assert consumer.stopped
    assert reader.silent_for(0.0) == float("inf")


async def test_opening_without_brokers_says_so() -> None:
    reader = ReplyReader(
        Connection(None), "replies", lambda count: 0, lambda record: None, lambda error: None
    )
    with pytest.raises(KafkaUnavailable, match="a:1"):
        await reader.open([], 1.0)


async def test_when_kafka_refuses_the_replies_it_is_said_and_reading_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reply_reader, "_REFUSED_PAUSE_S", 0.0)
    topic = Topic()
    first, last = Consumer(topic), Consumer(topic)
    refusals: list[KafkaRefused] = []
    reader = ReplyReader(
        Connection(first, KafkaRefused(servers="a:1", reason="the password"), last),
        "replies",
        lambda count: 0,
        lambda record: None,
        refusals.append,
    )
    await reader.open([], 1.0)
    task = asyncio.create_task(reader.run())
    first.failure = TopicAuthorizationFailedError("replies")
    first.broken = True
    await wait_until(lambda: len(refusals) == 2 and last.assigned != [])
    task.cancel()
    await asyncio.wait({task})
    await reader.close()

    assert "reading the replies: this user has no right to topic replies" in str(refusals[0])
    assert "the password" in str(refusals[1])
