"""The publisher over producers that do as the test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
from aiokafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)
from structlog.testing import capture_logs

from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.delivery.publisher import BrokerUnavailable, Publisher
from embedq_consumer.delivery.topic_directory import TopicDirectory
from embedq_consumer.telemetry.metrics import Metrics

Outcome = BaseException | None


def record(name: str, *, topic: str = "results", partition: int | None = None) -> Outgoing:
    return Outgoing(topic=topic, partition=partition, key=None, value=name.encode(), headers=[])


class FakeProducer:
    """Acknowledges each record a turn of the loop later, unless the test says what becomes of it."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.sent: list[str] = []
        self.calls: list[str] = []
        self.futures: list[asyncio.Future[Any]] = []

    async def start(self) -> None:
        self.calls.append("start")
        if self._broker.starts:
            problem = self._broker.starts.pop(0)
            if problem is not None:
                raise problem

    async def send(self, record: Outgoing) -> asyncio.Future[Any]:
        assert record.value is not None
        name = record.value.decode()
        self.calls.append(f"send {name}")
        if (problem := next(self._broker.raises.get(name, iter(())), None)) is not None:
            raise problem
        self.sent.append(name)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        future.add_done_callback(lambda _: self.calls.append(f"done {name}"))
        asyncio.get_running_loop().call_soon(self._broker.settle, name, future)
        return future

    async def flush(self) -> None:
        self.calls.append("flush")

    async def is_missing(self, place: Place) -> bool:
        return place[0] not in self._broker.topics or (place[1] or 0) >= self._broker.topics[place[0]]

    async def partition_counts(self) -> dict[str, int]:
        self._broker.looks += 1
        if (problem := next(self._broker.blind, None)) is not None:
            raise problem
        return dict(self._broker.topics)

    async def abandon(self) -> None:
        self.calls.append("abandon")


class Broker:
    """What the producers of one test meet, and the producers that were made."""

    def __init__(self) -> None:
        self.topics = {"results": 4, "replies": 1}
        self.made: list[FakeProducer] = []
        self.starts: list[BaseException | None] = []
        self.raises: dict[str, Iterator[BaseException]] = {}
        self.outcomes: dict[str, Iterator[Outcome]] = {}
        self.silent: set[str] = set()
        self.blind: Iterator[BaseException] = iter(())
        self.looks = 0

    def make(self) -> FakeProducer:
        self.made.append(FakeProducer(self))
        return self.made[-1]

    def settle(self, name: str, future: asyncio.Future[Any]) -> None:
        if name in self.silent or future.done():
            return
        outcome = next(self.outcomes[name], None) if name in self.outcomes else None
        if isinstance(outcome, asyncio.CancelledError):
            future.cancel()
        elif outcome is not None:
            future.set_exception(outcome)
        else:
            future.set_result(None)


class Opened:
    """An open publisher, its broker and its metrics."""

    def __init__(self, timeout_s: float) -> None:
        self.broker = Broker()
        self.metrics = Metrics()
        self.publisher = Publisher(
            self.broker.make,
            self.metrics,
            timeout_s=timeout_s,
            backoff_s=0,
            topics=TopicDirectory(min_age_s=0),
        )

    async def publish(self, *names: str) -> list[KafkaError | None]:
        return await self.publisher.publish([record(name) for name in names])

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"embedq_{name}")


async def opened(*, timeout_s: float = 30) -> Opened:
    one = Opened(timeout_s)
    await one.publisher.open()
    return one


async def test_records_are_sent_in_order_and_counted_once_acknowledged() -> None:
    one = await opened()
    assert await one.publish("a", "bcd") == [None, None]
    assert one.broker.made[0].sent == ["a", "bcd"]
    assert one.sample("results_total") == 2
    assert one.sample("result_bytes_total") == 4
    assert one.sample("producer_restarts_total") == 0


async def test_a_record_that_failed_is_sent_again_by_a_new_producer() -> None:
    one = await opened()
    one.broker.outcomes["b"] = iter([KafkaConnectionError(), KafkaConnectionError()])
    with capture_logs() as logs:
        assert await one.publish("a", "b", "c") == [None] * 3
    assert [producer.sent for producer in one.broker.made] == [["a", "b", "c"], ["b"], ["b"]]
    assert one.broker.made[0].calls[-1] == one.broker.made[1].calls[-1] == "abandon"
    assert one.sample("results_total") == 3
    assert one.sample("producer_restarts_total") == 2
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("producer_replaced", "KafkaConnectionError")
    ] * 2


async def test_a_record_that_the_broker_refuses_is_returned_and_the_producer_replaced() -> None:
    one = await opened()
    error = InvalidTopicError()
    one.broker.outcomes["a"] = iter([error])
    assert await one.publish("a", "b") == [error, None]
    assert one.sample("results_total") == 1
    assert one.sample("producer_restarts_total") == 1


async def test_a_record_that_the_producer_refuses_at_once_does_not_keep_the_others() -> None:
    one = await opened()
    error = MessageSizeTooLargeError()
    one.broker.raises["big"] = repeat(error)
    refused, kept = await one.publisher.publish([record("big"), record("b")])
    assert refused is error
    assert kept is None
    # It was tried alone, once.
    assert one.broker.made[1].calls == ["start", "flush", "send big", "abandon"]


async def test_a_record_alone_is_sent_after_all_before_it_and_waited_for() -> None:
    one = await opened()
    for name in ("a", "b"):
        one.broker.outcomes[name] = iter([MessageSizeTooLargeError()])
    assert await one.publish("a", "b", "c") == [None] * 3
    calls = ["start", "flush", "send a", "done a", "flush", "send b", "done b"]
    assert one.broker.made[1].calls == calls


async def test_a_topic_that_does_not_exist_is_refused_without_a_send_and_forgotten() -> None:
    one = await opened()
    del one.broker.topics["replies"]
    assert one.publisher.topics.partitions("replies") == 1
    outcomes = await one.publisher.publish([record("a", topic="replies"), record("b")])
    assert isinstance(outcomes[0], UnknownTopicOrPartitionError)
    assert outcomes[1] is None
    assert one.broker.made[0].sent == ["b"]
    assert one.publisher.topics.partitions("replies") is None


async def test_a_partition_that_does_not_exist_is_refused() -> None:
    one = await opened()
    (outcome,) = await one.publisher.publish([record("a", partition=4)])
    assert isinstance(outcome, UnknownTopicOrPartitionError)


async def test_no_acknowledgement_within_the_time_out_is_an_unavailable_broker() -> None:
    one = await opened(timeout_s=0.01)
    one.broker.outcomes["a"] = repeat(KafkaConnectionError())
    with pytest.raises(BrokerUnavailable, match=r"no result was acknowledged for 0.01 s") as caught:
        await one.publish("a")
    assert isinstance(caught.value.__cause__, KafkaConnectionError)


async def test_a_record_without_any_answer_is_given_up_after_the_attempt() -> None:
    one = await opened(timeout_s=0.01)
    one.broker.silent = {"a"}
    with pytest.raises(BrokerUnavailable) as caught:
        await one.publish("a", "b")
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert one.sample("results_total") == 1  # b
    silent = [future for producer in one.broker.made for future in producer.futures if future.cancelled()]
    assert len(silent) == len([1 for producer in one.broker.made if "a" in producer.sent])


async def test_a_record_of_a_producer_that_was_closed_meanwhile_is_sent_again() -> None:
    one = await opened()
    one.broker.outcomes["a"] = iter([asyncio.CancelledError()])
    assert await one.publish("a") == [None]
    assert one.sample("producer_restarts_total") == 1


async def test_whatever_is_not_acknowledged_when_a_producer_fails_is_sent_again() -> None:
    one = await opened()
    one.broker.raises["b"] = iter([KafkaConnectionError()])
    assert await one.publish("a", "b", "c") == [None] * 3
    assert one.broker.made[0].sent == ["a"]
    assert one.broker.made[0].futures[0].cancelled()
    assert one.broker.made[1].sent == ["a", "b", "c"]
    assert one.sample("results_total") == 3


async def test_a_new_producer_that_cannot_connect_is_replaced_until_one_does() -> None:
    one = await opened()
    one.broker.outcomes["a"] = iter([KafkaConnectionError()])
    one.broker.starts = [TimeoutError(), KafkaConnectionError(), None]
    assert await one.publish("a") == [None]
    assert [producer.calls[-1] for producer in one.broker.made[1:3]] == ["abandon", "abandon"]
    assert one.sample("producer_restarts_total") == 3


async def test_two_that_meet_the_same_broken_producer_replace_it_once() -> None:
    one = await opened()
    one.broker.outcomes = {name: iter([KafkaConnectionError()]) for name in ("a", "b")}
    both = await asyncio.gather(one.publish("a"), one.publish("b"))
    assert list(both) == [[None], [None]]
    assert len(one.broker.made) == 2
    assert one.sample("producer_restarts_total") == 1


async def test_nothing_to_publish_is_published() -> None:
    one = await opened()
    assert await one.publisher.publish([]) == []
    assert one.broker.made[0].sent == []


async def test_a_broker_that_is_not_there_at_the_start_is_an_error_and_leaves_nothing_open() -> None:
    one = Opened(30)
    one.broker.starts = [KafkaConnectionError()]
    with pytest.raises(KafkaConnectionError):
        await one.publisher.open()
    assert one.broker.made[0].calls == ["start", "abandon"]


async def test_after_close_the_producer_is_gone_and_a_second_close_does_nothing() -> None:
    one = await opened()
    await one.publisher.close()
    await one.publisher.close()
    assert one.broker.made[0].calls == ["start", "abandon"]


async def test_topics_that_were_made_since_are_seen_after_a_refresh() -> None:
    one = await opened()
    one.broker.topics["new"] = 7
    assert one.publisher.topics.partitions("new") is None
    one.broker.blind = iter([KafkaConnectionError()])  # and a look that fails is repeated
    await one.publisher.refresh_topics()
    assert one.publisher.topics.partitions("new") == 7


async def test_callers_that_ask_for_topics_at_once_share_one_look() -> None:
    one = await opened()
    before = one.broker.looks
    await asyncio.gather(*(one.publisher.refresh_topics() for _ in range(10)))
    assert one.broker.looks == before + 1


async def test_no_answer_about_topics_within_the_time_out_is_an_unavailable_broker() -> None:
    one = await opened(timeout_s=0.01)
    one.broker.blind = repeat(KafkaConnectionError())
    with pytest.raises(BrokerUnavailable, match=r"no broker answered for 0.01 s"):
        await one.publisher.refresh_topics()


async def test_topics_are_not_asked_for_more_often_than_their_least_age() -> None:
    directory = TopicDirectory(min_age_s=0.05)
    producer = Broker().make()
    await directory.refresh(producer, since=time.monotonic())
    began = time.monotonic()
    await directory.refresh(producer, since=began)
    assert directory.partitions("results") == 4
    assert time.monotonic() - began >= 0.04
