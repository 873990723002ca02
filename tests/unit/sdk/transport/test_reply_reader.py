"""The reply reader over consumers in memory: its place, foreign records, broken connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError

from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport import reply_reader, reply_topic
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.reply_reader import ReplyReader
from embedq_shared.kafka import KafkaOptions, TopicFacts, Unreadable
from tests.helpers.support import wait_until

PARTITIONS = 4


class Topic:
    """One topic in memory, for all consumers of a test."""

    def __init__(self) -> None:
        self.records: dict[int, list[bytes | None]] = {n: [] for n in range(PARTITIONS)}
        """None stands for a record that cannot be read."""
        self.id = "1"
        """Empty where there is no such topic."""

    def make_anew(self, partitions: int = PARTITIONS) -> None:
        """Delete it, and make another one of its name."""
        self.records = {n: [] for n in range(partitions)}
        self.id = f"{self.id}'"


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

    async def topic_facts(self, topic: str) -> TopicFacts | None:
        await asyncio.sleep(0)
        return TopicFacts(self._topic.id, len(self._topic.records)) if self._topic.id else None

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
        found = self._topic.records.get(partition.partition, [])[self.at : self.at + (max_records or 500)]
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
async def running(
    *consumers: Consumer | None,
    refused: Callable[[Any], None] = lambda error: None,
    moved: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[ReplyReader, list[bytes]]]:
    delivered: list[bytes] = []
    reader = ReplyReader(
        Connection(*consumers),
        "replies",
        lambda count: count - 1,
        lambda record: delivered.append(record.value),
        refused,
        moved,
    )
    assert await reader.open(["jobs", "replies"], 1.0) == await reader.topics() == {"jobs", "replies"}
    tasks = {asyncio.create_task(reader.run()), asyncio.create_task(reader.watch())}
    try:
        yield reader, delivered
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
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


async def test_who_waits_for_a_reply_goes_on_before_the_next_poll() -> None:
    done: list[str] = []
    reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    class Noting(Consumer):
        async def getmany(self, *args: Any, **options: Any) -> dict[TopicPartition, list[Any]]:
            done.append("poll")
            return await super().getmany(*args, **options)

    def deliver(record: Any) -> None:
        done.append("reply")
        reply.set_result(None)

    async def caller() -> None:
        await reply
        done.append("caller")

    topic = Topic()
    reader = ReplyReader(
        Connection(Noting(topic)),
        "replies",
        lambda count: count - 1,
        deliver,
        lambda error: None,
        lambda: None,
    )
    await reader.open(["jobs", "replies"], 1.0)
    topic.records[3] += [b"one"]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(caller())
        reading = tasks.create_task(reader.run())
        await reply
        reading.cancel()
    await reader.close()
    assert done == ["poll", "reply", "caller"]


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


async def test_silence_grows_while_no_fetch_is_answered_and_our_own_stall_is_none() -> None:
    consumer = Consumer(Topic())
    async with running(consumer) as (reader, _):
        await wait_until(lambda: reader.silent_for(time.monotonic()) > 0.05, what="silence")
        assert reader.silent_for(time.monotonic() + 3600) < 2.0, "an hour in which nobody listened"
        consumer.last_poll = 98_000
        await wait_until(lambda: reader.silent_for(time.monotonic()) < 0.05, what="an answer")
    assert reader.silent_for(time.monotonic()) == float("inf")


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_reader, "_LOOK_EVERY_S", 0.01)


@pytest.mark.usefixtures("looks_often")
async def test_a_topic_that_was_made_anew_is_read_from_its_beginning_with_another_consumer() -> None:
    """However long it is by then: a position in the old topic means nothing in the new one."""
    topic, moves = Topic(), list[int]()
    topic.records[3] = [b"old"] * 5
    first, second = Consumer(topic), Consumer(topic)
    async with running(first, second, moved=lambda: moves.append(1)) as (reader, delivered):
        topic.make_anew()
        topic.records[3] += [b"%d" % n for n in range(9)]
        await wait_until(lambda: second.at == 9)
        assert delivered[-9:] == [b"%d" % n for n in range(9)]
        assert first.stopped
        assert moves == [1]
        assert reader.partition == 3
        topic.records[3] += [b"next"]
        await wait_until(lambda: delivered[-1] == b"next")


@pytest.mark.usefixtures("looks_often")
async def test_in_a_topic_with_another_number_of_partitions_another_one_is_chosen() -> None:
    topic, partitions = Topic(), list[int]()
    first, second = Consumer(topic), Consumer(topic)
    async with running(first, second, moved=lambda: partitions.append(reader.partition)) as (
        reader,
        delivered,
    ):
        topic.make_anew(2)
        topic.records[1] += [b"one"]
        await wait_until(lambda: delivered == [b"one"])
        assert partitions == [1], "who sends the jobs must know the new address when it is told"
        assert second.assigned == [TopicPartition("replies", 1)]


@pytest.mark.usefixtures("looks_often")
async def test_a_topic_that_stays_away_is_said_again_and_again_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reply_topic, "GONE_S", 0.05)
    topic, refusals = Topic(), list[Exception]()
    async with running(Consumer(topic), Consumer(topic), refused=refusals.append) as (_, delivered):
        topic.id = ""
        await wait_until(lambda: len(refusals) > 2)
        assert {(type(error), str(error)) for error in refusals} == {
            (TopicMissing, str(TopicMissing(servers="a:1", topic="replies")))
        }
        topic.make_anew()
        topic.records[3] = [b"one"]
        await wait_until(lambda: delivered[-1:] == [b"one"])


async def test_a_missing_topic_closes_the_connection_again() -> None:
    consumer = Consumer(Topic())
    reader = ReplyReader(
        Connection(consumer),
        "replies",
        lambda count: 0,
        lambda record: None,
        lambda error: None,
        lambda: None,
    )
    with pytest.raises(TopicMissing, match="bulk"):
        await reader.open(["jobs", "bulk"], 1.0)

    assert consumer.stopped
    assert reader.silent_for(0.0) == float("inf")


async def test_each_step_of_opening_has_what_the_steps_before_have_left_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    given: dict[str, float] = {}

    class Slow(Consumer):
        async def topics(self) -> set[str]:
            nonlocal now
            now += 0.75
            return await super().topics()

    class Noting(Connection):
        async def call(self, seconds: float, what: str, work: Any) -> Any:
            given[what] = seconds
            return await super().call(seconds, what, work)

    monkeypatch.setattr(reply_reader, "time", SimpleNamespace(monotonic=lambda: now))
    reader = ReplyReader(
        Noting(Slow(Topic())),
        "replies",
        lambda count: 0,
        lambda record: None,
        lambda error: None,
        lambda: None,
    )
    await reader.open(["jobs"], 1.0)
    await reader.close()
    assert given["finding the end of the reply partition"] == 0.25


async def test_opening_without_brokers_says_so() -> None:
    reader = ReplyReader(
        Connection(None), "replies", lambda count: 0, lambda record: None, lambda error: None, lambda: None
    )
    with pytest.raises(KafkaUnavailable, match="a:1"):
        await reader.open([], 1.0)


async def test_when_kafka_refuses_the_replies_it_is_said_and_reading_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reply_reader, "_REFUSED_PAUSE_S", 0.0)
    topic = Topic()
    first, last = Consumer(topic), Consumer(topic)
    refusals: list[Exception] = []
    reader = ReplyReader(
        Connection(first, KafkaRefused(servers="a:1", reason="the password"), last),
        "replies",
        lambda count: 0,
        lambda record: None,
        refusals.append,
        lambda: None,
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
