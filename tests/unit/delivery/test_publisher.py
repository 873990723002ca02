"""The publisher over producers that do as the test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Any

import msgspec
import pytest
from aiokafka.errors import (
    InvalidTimestampError,
    InvalidTopicError,
    KafkaConnectionError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    OutOfOrderSequenceNumber,
    UnknownTopicOrPartitionError,
)
from structlog.testing import capture_logs

from embedq_consumer.delivery import destination, lane, publisher
from embedq_consumer.delivery.destination import Parcel, Presence, Undelivered
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.delivery.publisher import Publisher
from embedq_consumer.delivery.topic_directory import TopicDirectory
from embedq_consumer.fairness import BulkTurns, InteractiveTraffic
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import BatchFull, Evicted
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until

Outcome = BaseException | None


def record(
    name: str,
    *,
    topic: str = "results",
    partition: int | None = 0,
    anywhere: bool = False,
    express: bool = False,
) -> Outgoing:
    return Outgoing(
        topic=topic,
        partition=partition,
        key=None,
        value=name.encode(),
        headers=[],
        anywhere=anywhere,
        express=express,
    )


class FakeProducer:
    """Acknowledges each record a turn of the loop later, unless the test says what becomes of it."""

    def __init__(self, broker: Broker, kind: str) -> None:
        self._broker = broker
        self.kind = kind
        self.alive = True
        self.asked = 0
        """How often it was to send something."""
        self.sent: list[str] = []
        self.open: dict[Place, list[asyncio.Future[Any]]] = {}
        self.evicted: list[Place] = []
        self.forgotten: list[str] = []
        self.abandoned = False
        self.known: set[Place] = set()

    async def start(self) -> None:
        if (problem := next(self._broker.starts, None)) is not None:
            raise problem

    def send(self, place: Place, records: Sequence[Outgoing]) -> tuple[asyncio.Future[Any], int]:
        """Each in a batch of its own, or all together; a refusal is the next call's if something went before it."""
        assert place in self.known
        self.asked += 1
        batch: asyncio.Future[Any] | None = None
        for sent, record in enumerate(records):
            assert record.value is not None
            name = record.value.decode()
            if batch is not None and not (self._broker.batches and name not in self._broker.raises):
                return batch, sent
            if (problem := next(self._broker.raises.get(name, iter(())), None)) is not None:
                raise problem
            batch = self._append(place, name)
        assert batch is not None
        return batch, len(records)

    def _append(self, place: Place, name: str) -> asyncio.Future[Any]:
        self.sent.append(name)
        open_here = self.open.setdefault(place, [])
        if self._broker.batches and open_here and not open_here[-1].done():
            return open_here[-1]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        open_here.append(future)
        asyncio.get_running_loop().call_soon(self._broker.settle, self, place, name, future)
        return future

    def has_leader(self, place: Place) -> bool:
        return place in self.known and place not in self._broker.leaderless

    async def look_up(self, place: Place) -> None:
        self._broker.looked_up += 1
        if self._broker.topics.get(place[0], 0) <= place[1]:
            raise UnknownTopicOrPartitionError
        if place in self._broker.leaderless:
            raise LeaderNotAvailableError
        self.known.add(place)

    def evict(self, place: Place) -> None:
        self.evicted.append(place)
        for future in self.open.pop(place, []):
            if not future.done():
                future.set_exception(Evicted())

    def last_error(self, place: Place, since: float) -> Exception | None:
        return self._broker.said.get(place)

    def forget(self, topic: str) -> None:
        self.forgotten.append(topic)

    async def partition_counts(self) -> dict[str, int]:
        self._broker.looks += 1
        if (problem := next(self._broker.blind, None)) is not None:
            raise problem
        return dict(self._broker.topics)

    async def abandon(self) -> None:
        self.abandoned = True


class Broker:
    """What the producers of one test meet, and the producers that were made."""

    def __init__(self) -> None:
        self.topics = {"results": 4, "replies": 2}
        self.made: list[FakeProducer] = []
        self.starts: Iterator[BaseException | None] = iter(())
        self.raises: dict[str, Iterator[BaseException]] = {}
        self.outcomes: dict[str, Iterator[Outcome]] = {}
        self.refusing: dict[Place, BaseException] = {}
        self.silent: set[Place] = set()
        self.leaderless: set[Place] = set()
        self.batches = False
        """Whether what is sent together has one future."""
        self.said: dict[Place, Exception] = {}
        self.blind: Iterator[BaseException] = iter(())
        self.looks = self.looked_up = 0

    def common(self) -> FakeProducer:
        self.made.append(FakeProducer(self, "common"))
        return self.made[-1]

    def apart(self) -> FakeProducer:
        self.made.append(FakeProducer(self, "apart"))
        return self.made[-1]

    def settle(self, producer: FakeProducer, place: Place, name: str, future: asyncio.Future[Any]) -> None:
        if place in self.silent or future.done():
            return
        outcome = self.refusing.get(place) or next(self.outcomes.get(name, iter(())), None)
        if isinstance(outcome, asyncio.CancelledError):
            future.cancel()
        elif outcome is not None:
            future.set_exception(outcome)
        else:
            future.set_result(None)

    def sent_by(self, kind: str) -> list[str]:
        return [name for producer in self.made if producer.kind == kind for name in producer.sent]


class Opened:
    """An open publisher, its broker and its metrics."""

    def __init__(self, max_held: int, turns: BulkTurns | None = None) -> None:
        self.broker = Broker()
        self.metrics = Metrics()
        self.trouble: str | None = None
        self.publisher = Publisher(
            self.broker,
            self.metrics,
            max_held=max_held,
            hinder=self._hinder,
            topics=TopicDirectory(min_age_s=0),
            bulk_turns=turns,
        )
        self.settled: dict[str, Exception | None] = {}

    def _hinder(self, reason: str | None) -> None:
        self.trouble = reason

    async def publish(self, *names: str, timeout_s: float | None = None) -> list[Exception | None]:
        return await self.publisher.publish([record(name) for name in names], timeout_s=timeout_s)

    def send(self, sent: Outgoing, timeout_s: float | None = None) -> None:
        self.publisher.send([self._parcel(sent, timeout_s)])

    def send_all(self, records: Sequence[Outgoing]) -> None:
        self.publisher.send([self._parcel(each) for each in records])

    def _parcel(self, sent: Outgoing, timeout_s: float | None = None) -> Parcel:
        name = (sent.value or b"").decode()

        def settled(error: Exception | None) -> None:
            assert name not in self.settled, "settled twice"
            self.settled[name] = error

        return Parcel(sent, settled, timeout_s)

    def sample(self, name: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits waits a fraction of it."""
    monkeypatch.setattr(publisher, "_TICK_S", 0.005)
    monkeypatch.setattr(lane, "_RENEWALS_S", (0.01,))
    monkeypatch.setattr(lane, "_COMMON_PATIENCE_S", 0.05)
    monkeypatch.setattr(lane, "_APART_PATIENCE_S", 0.1)
    monkeypatch.setattr(lane, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(destination, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(destination, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(destination, "CONFIRM_S", 0.05)


@asynccontextmanager
async def opened(*, max_held: int = 1000, turns: BulkTurns | None = None) -> AsyncIterator[Opened]:
    one = Opened(max_held, turns)
    await one.publisher.open()
    try:
        yield one
    finally:
        await one.publisher.close()


@asynccontextmanager
async def others(one: Opened) -> AsyncIterator[None]:
    """Meanwhile records of other places are taken again and again."""

    async def run() -> None:
        while True:
            await one.publisher.publish([record("other", topic="replies", partition=1)])
            await asyncio.sleep(0.002)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()


# -- what works ------------------------------------------------------------------------------------------------------------


async def test_records_are_sent_in_order_and_counted_once_acknowledged() -> None:
    async with opened() as one:
        assert await one.publish("a", "bcd") == [None, None]
        assert one.broker.made[0].sent == ["a", "bcd"]
        assert one.sample("results_total") == 2
        assert one.sample("result_bytes_total") == 4
        assert one.sample("producer_restarts_total") == 0
        assert one.trouble is None


async def test_records_of_a_batch_have_one_answer() -> None:
    async with opened() as one:
        one.broker.batches = True
        assert await one.publish("known") == [None]
        assert await one.publish("a", "bcd", "e") == [None, None, None]
        assert one.sample("results_total") == 4
        one.broker.outcomes = {
            "f": iter([MessageSizeTooLargeError(), None])
        }  # what the broker says of f and g together
        assert await one.publish("f", "g") == [None, None]
        assert one.broker.made[0].sent == ["known", "a", "bcd", "e", "f", "g"]
        assert one.broker.sent_by("apart") == ["f", "g"]


async def test_of_records_that_are_sent_together_each_has_its_own_fate() -> None:
    async with opened() as one:
        one.broker.batches = True
        assert await one.publish("known") == [None]
        one.broker.raises = {"large": iter([MessageSizeTooLargeError()] * 2), "late": iter([BatchFull()])}
        large, *others = await asyncio.gather(
            one.publish("large"), one.publish("a", "b"), one.publish("late", "c")
        )
        assert isinstance(large[0], MessageSizeTooLargeError)
        assert others == [[None, None], [None, None]]
        assert one.sample("results_total") == 5
        sent = [name for producer in one.broker.made for name in producer.sent]
        assert [name for name in sent if name != "known"] == ["a", "b", "late", "c"]


async def test_nothing_to_publish_is_published() -> None:
    async with opened() as one:
        assert await one.publish() == []


async def test_a_place_is_looked_up_once() -> None:
    async with opened() as one:
        await one.publish("a", "b")
        await one.publish("c")
        assert one.broker.looked_up == 1


# -- interactive results before bulk ones ----------------------------------------------------------------------------------


def sent_to_the_common_one(one: Opened) -> list[str]:
    return [name[:9] for name in one.broker.made[0].sent]


async def test_an_express_record_goes_before_all_that_waits_for_its_place() -> None:
    async with opened() as one:
        assert await one.publish("known") == [None]
        one.broker.silent.add(("results", 0))
        for number in range(4):
            one.send(record(f"bulk-{number}-" + "x" * 600_000))
        await wait_until(lambda: "bulk-0-xx" in sent_to_the_common_one(one))
        one.send(record("express-1", express=True))
        one.send(record("express-2", express=True))
        await wait_until(lambda: len(one.broker.made[0].sent) == 4)
        assert sent_to_the_common_one(one) == ["known", "bulk-0-xx", "express-1", "express-2"]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside interactive work"])
async def test_an_express_record_is_with_the_producer_at_once_and_what_is_not_a_round_later(
    beside: bool,
) -> None:
    traffic = InteractiveTraffic()
    async with opened(turns=BulkTurns(traffic)) as one:
        assert await one.publish("known") == [None]
        if beside:
            traffic.note(time.monotonic())
        one.send(record("bulk"))
        one.send(record("express", express=True))
        assert sent_to_the_common_one(one) == ["known", "express"]
        await wait_until(lambda: len(one.settled) == 2)
        assert sent_to_the_common_one(one) == ["known", "express", "bulk"]


@pytest.mark.parametrize("beside", [False, True])
async def test_large_deliveries_are_handed_over_together_a_round_later_express_ones_first(
    beside: bool,
) -> None:
    traffic = InteractiveTraffic()
    async with opened(turns=BulkTurns(traffic)) as one:
        one.broker.batches = True
        assert await one.publish("known") == [None]
        if beside:
            traffic.note(time.monotonic())
        asked = one.broker.made[0].asked
        one.send_all([record(f"bulk-{number}") for number in range(20)])
        for delivery in range(3):
            one.send_all([record(f"{delivery}-{number}", express=True) for number in range(20)])
        assert one.broker.made[0].asked == asked
        await wait_until(lambda: len(one.settled) == 80)
        sent = one.broker.made[0].sent[1:]
        express = [f"{delivery}-{number}" for delivery in range(3) for number in range(20)]
        assert sent == [*express, *(f"bulk-{number}" for number in range(20))]
        assert one.broker.made[0].asked - asked <= 2


async def test_beside_interactive_work_less_bulk_is_given_to_the_producer_at_once() -> None:
    traffic = InteractiveTraffic()
    async with opened(turns=BulkTurns(traffic)) as one:
        assert await one.publish("known") == [None]
        one.broker.silent.add(("results", 0))
        traffic.note(time.monotonic())
        for number in range(20):
            one.send(record(f"bulk-{number:02}-" + "x" * 100_000))
        await wait_until(lambda: len(one.broker.made[0].sent) == 3)
        await asyncio.sleep(0.02)  # several ticks
        assert sent_to_the_common_one(one) == ["known", "bulk-00-x", "bulk-01-x"]


async def test_an_express_record_does_not_wait_for_the_turns_of_others_and_all_are_settled() -> None:
    traffic = InteractiveTraffic()
    traffic.note(time.monotonic())
    async with opened(turns=BulkTurns(traffic)) as one:
        reply = record("now", topic="replies", partition=1, express=True)
        assert await one.publish("known") == [None]
        assert await one.publisher.publish([msgspec.structs.replace(reply, value=b"hello")]) == [None]
        for number in range(2000):
            one.send(record(f"{number}"))
        for _ in range(5):
            await asyncio.sleep(0)
        one.send(reply)
        await wait_until(lambda: "now" in one.broker.made[0].sent)
        assert one.broker.made[0].sent.index("now") < 600
        await wait_until(lambda: len(one.settled) == 2001)
        assert [name for name in one.broker.made[0].sent if name.isdigit()] == [f"{n}" for n in range(2000)]
        assert one.sample("results_total") == 2003


# -- one place fails --------------------------------------------------------------------------------------------------------


async def test_a_place_that_fails_is_set_apart_and_its_records_are_sent_there_in_order() -> None:
    async with opened() as one:
        one.broker.outcomes = {name: iter([NotEnoughReplicasError()]) for name in ("a", "b")}
        with capture_logs() as logs:
            assert await one.publish("a", "b") == [None, None]
        assert one.broker.sent_by("common") == ["a", "b"]
        assert one.broker.sent_by("apart") == ["a", "b"]
        assert one.broker.made[0].evicted == [("results", 0)]
        [line] = logs
        assert (line["event"], line["reason"]) == ("destination_set_apart", "NOT_ENOUGH_REPLICAS")
        assert (line["topic"], line["partition"]) == ("results", 0)
        assert await one.publish("c") == [None]
        assert one.broker.sent_by("apart")[-1] == "c"
        assert one.sample("producer_restarts_total") == 0


async def test_a_place_that_fails_delays_no_other() -> None:
    async with opened() as one:
        one.broker.refusing["results", 0] = NotEnoughReplicasError()
        one.broker.silent.add(("results", 1))
        one.broker.leaderless.add(("results", 2))
        for partition in range(3):
            one.send(record(f"sick-{partition}", partition=partition))
        for number in range(100):
            assert await one.publisher.publish([record(f"{number}", partition=3)]) == [None]
        assert one.settled == {}


async def test_a_place_that_is_silent_while_others_are_heard_is_set_apart() -> None:
    async with opened() as one:
        one.broker.silent.add(("results", 0))
        one.send(record("a"))
        async with others(one):
            await wait_until(lambda: "a" in one.broker.sent_by("apart"))
        one.broker.silent.clear()
        async with others(one):
            await wait_until(lambda: one.settled == {"a": None})


async def test_a_late_answer_of_a_producer_that_was_given_up_does_not_count() -> None:
    async with opened() as one:
        one.broker.silent.add(("results", 0))
        one.send(record("a"))
        await wait_until(lambda: one.broker.made[0].sent == ["a"])
        [late] = one.broker.made[0].open["results", 0]
        one.broker.made[0].open.clear()  # the test holds it back, even from being evicted
        async with others(one):
            await wait_until(lambda: "a" in one.broker.sent_by("apart"))
        late.set_result(None)
        await asyncio.sleep(0.02)
        assert one.settled == {}


async def test_after_its_time_a_place_is_given_up_with_the_reason_and_refuses_at_once() -> None:
    async with opened() as one:
        one.broker.refusing["results", 0] = NotEnoughReplicasError()
        async with others(one):
            [error] = await one.publish("a", timeout_s=0.1)
            assert isinstance(error, Undelivered)
            assert "NOT_ENOUGH_REPLICAS" in str(error)
            sent = len(one.broker.sent_by("apart"))
            [refused] = await one.publish("b", timeout_s=0.1)
        assert isinstance(refused, Undelivered)
        assert "b" not in one.broker.sent_by("apart")[sent:]


async def test_a_record_without_a_time_out_waits_until_its_place_works() -> None:
    async with opened() as one:
        one.broker.refusing["results", 0] = InvalidTopicError()
        one.send(record("a"))
        async with others(one):
            [error] = await one.publish("b", timeout_s=10)
            assert isinstance(error, InvalidTopicError)
            assert one.settled == {}
            one.broker.refusing.clear()
            await wait_until(lambda: one.settled == {"a": None})


async def test_a_record_that_may_go_elsewhere_does() -> None:
    async with opened() as one:
        one.broker.leaderless.add(("results", 0))
        one.send(record("a", anywhere=True))
        await wait_until(lambda: one.settled == {"a": None})
        one.send(record("b", anywhere=True))
        await wait_until(lambda: "b" in one.settled)
        assert one.broker.made[0].open.keys() == {("results", 1)}


async def test_many_places_that_fail_share_a_few_producers() -> None:
    async with opened() as one:
        one.broker.topics["many"] = 30
        for partition in range(30):
            one.broker.refusing["many", partition] = NotEnoughReplicasError()
            one.send(record(f"{partition}", topic="many", partition=partition))
        await wait_until(lambda: len(set(one.broker.sent_by("apart"))) == 30)
        assert len(one.broker.made) == 1 + 8


async def test_what_waits_for_failing_places_is_bounded() -> None:
    async with opened(max_held=5) as one:
        one.broker.refusing["results", 0] = NotEnoughReplicasError()
        for number in range(8):
            one.send(record(f"{number}"), timeout_s=100)
        async with others(one):
            await wait_until(lambda: len(one.settled) == 3)
        assert one.settled.keys() == {"0", "1", "2"}


async def test_a_place_returns_after_its_probation_if_the_producer_may_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(destination, "_PROBATION_S", 0.01)
    monkeypatch.setattr(lane, "_RENEW_S", 0.0)
    async with opened() as one:
        one.broker.outcomes["a"] = iter([NotEnoughReplicasError()])
        assert await one.publish("a") == [None]

        async def comes_back() -> bool:
            await one.publish("again")
            return "again" in one.broker.made[-1].sent and one.broker.made[-1].kind == "common"

        await wait_until(comes_back)
        assert one.sample("producer_restarts_total") == 1
        await wait_until(lambda: one.broker.made[0].abandoned, what="the end of the producer before")


# -- records that are refused -----------------------------------------------------------------------------------------------


async def test_a_record_that_the_broker_refuses_is_returned_and_no_producer_replaced() -> None:
    async with opened() as one:
        error = InvalidTimestampError()
        one.broker.outcomes["a"] = repeat(error)
        assert await one.publish("a") == [error]
        assert await one.publish("b") == [None]
        assert one.broker.sent_by("apart") == ["b"]  # the sequence of the first producer has a gap
        assert one.sample("results_total") == 1
        assert one.sample("producer_restarts_total") == 0


async def test_a_batch_that_is_refused_for_one_record_is_sent_again_one_by_one() -> None:
    async with opened() as one:
        error = InvalidTimestampError()
        one.broker.outcomes = {
            "a": iter([error]),
            "b": repeat(error),
            "c": iter([error]),
        }
        assert await one.publish("a", "b", "c") == [None, error, None]
        assert one.broker.sent_by("apart") == ["a", "b", "c"]


async def test_a_record_that_the_producer_refuses_at_once_does_not_keep_the_others() -> None:
    async with opened() as one:
        error = MessageSizeTooLargeError()
        one.broker.raises["big"] = repeat(error)
        assert await one.publish("a", "big", "c") == [None, error, None]


async def test_a_topic_that_does_not_exist_is_refused_once_certain_and_forgotten() -> None:
    async with opened() as one:
        del one.broker.topics["replies"]
        assert one.publisher.topics.partitions("replies") == 2
        [error] = await one.publisher.publish([record("a", topic="replies")], timeout_s=10)
        assert isinstance(error, UnknownTopicOrPartitionError)
        assert one.publisher.topics.partitions("replies") is None


async def test_a_topic_that_is_new_to_the_brokers_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "CONFIRM_S", 300.0)
    async with opened() as one:
        one.send(record("a", topic="new"), timeout_s=10)
        await wait_until(lambda: one.broker.looked_up > 2)
        one.broker.topics["new"] = 1
        await wait_until(lambda: one.settled == {"a": None})


# -- the producer fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OutOfOrderSequenceNumber(), asyncio.CancelledError()])
async def test_what_is_wrong_with_the_producer_costs_no_record(error: BaseException) -> None:
    async with opened() as one:
        one.broker.outcomes["a"] = iter([error])
        assert await one.publish("a", "b") == [None, None]


async def test_a_common_producer_that_ended_is_replaced_and_its_records_sent_by_the_next() -> None:
    async with opened() as one:
        one.broker.silent.add(("results", 0))
        one.send(record("a"))
        await wait_until(lambda: one.broker.made[0].sent == ["a"])
        one.broker.silent.clear()
        one.broker.made[0].alive = False
        await wait_until(lambda: one.settled == {"a": None})
        assert one.broker.made[1].kind == "common"
        assert one.sample("producer_restarts_total") == 1


async def test_a_producer_apart_that_ended_is_replaced() -> None:
    async with opened() as one:
        one.broker.refusing["results", 0] = NotEnoughReplicasError()
        one.send(record("a"))
        await wait_until(lambda: "a" in one.broker.sent_by("apart"))
        one.broker.made[1].alive = False
        await wait_until(lambda: len(one.broker.made) == 3 and one.broker.made[2].sent != [])
        one.broker.refusing.clear()
        await wait_until(lambda: one.settled == {"a": None})


# -- Kafka is away -----------------------------------------------------------------------------------------------------------


async def test_while_kafka_is_away_everything_waits_and_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Presence, "AWAY_S", 0.05)
    async with opened() as one:
        everywhere = {(topic, at) for topic, count in one.broker.topics.items() for at in range(count)}
        one.broker.silent |= everywhere
        one.broker.starts = repeat(KafkaConnectionError())
        with capture_logs() as logs:
            for name in ("a", "b"):
                one.send(record(name), timeout_s=0.01)
            await wait_until(lambda: (one.trouble or "").startswith("Kafka has taken nothing"))
            await wait_until(lambda: len(one.broker.made) > 3, what="some tries")
            assert one.settled == {}
            one.broker.silent.clear()
            one.broker.starts = iter(())
            await wait_until(lambda: one.settled == {"a": None, "b": None})
        assert [line["event"] for line in logs] == ["kafka_away", "producer_replaced", "kafka_back"]
        await wait_until(lambda: one.trouble is None)


async def test_an_event_loop_that_stood_still_does_not_say_that_kafka_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Presence, "AWAY_S", 0.4)
    monkeypatch.setattr(lane, "_COMMON_PATIENCE_S", 10.0)
    monkeypatch.setattr(publisher, "_STOOD_STILL_S", 0.3)
    async with opened() as one:
        everywhere = {(topic, at) for topic, count in one.broker.topics.items() for at in range(count)}
        one.broker.silent |= everywhere
        one.send(record("a"))
        await wait_until(lambda: one.broker.made[0].sent == ["a"])
        with capture_logs() as logs:
            # The answer lies in the socket meanwhile, and is read a turn after the next tick.
            asyncio.get_running_loop().call_soon(time.sleep, 1.0)
            await asyncio.sleep(0.02)
            [[answer]] = one.broker.made[0].open.values()
            answer.set_result(None)
            await wait_until(lambda: one.settled == {"a": None})
        assert logs == []


async def test_an_own_topic_that_takes_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Presence, "AWAY_S", 0.05)
    async with opened() as one:
        one.broker.topics["results"] = 1
        await one.publisher.refresh_topics()
        one.broker.refusing["results", 0] = NotEnoughReplicasError()
        one.send(record("a", partition=None))
        async with others(one):
            await wait_until(lambda: (one.trouble or "").startswith("topic results has taken nothing"))
            one.broker.refusing.clear()
            await wait_until(lambda: one.settled == {"a": None})
            await wait_until(lambda: one.trouble is None)


async def test_what_is_announced_is_given_up_soon_and_not_sent_later() -> None:
    async with opened() as one:
        one.broker.leaderless.add(("results", 0))
        began = time.monotonic()
        await one.publisher.announce([record("a")], within=0.05)
        assert time.monotonic() - began < 5
        one.broker.leaderless.clear()
        assert await one.publish("b") == [None]
        assert "a" not in one.broker.sent_by("common") + one.broker.sent_by("apart")


async def test_a_broker_that_is_not_there_at_the_start_is_an_error_and_it_can_be_opened_again() -> None:
    one = Opened(10)
    one.broker.starts = iter([KafkaConnectionError()])
    with pytest.raises(KafkaConnectionError):
        await one.publisher.open()
    assert one.broker.made[0].abandoned
    one.broker.blind = iter([KafkaConnectionError()])
    with pytest.raises(KafkaConnectionError):
        await one.publisher.open()
    assert one.broker.made[1].abandoned
    await one.publisher.open()
    assert await one.publish("a") == [None]
    await one.publisher.close()
    await one.publisher.close()
    assert all(producer.abandoned for producer in one.broker.made)


async def test_a_bug_in_here_is_raised_by_the_watch() -> None:
    async with opened() as one:
        one.broker.outcomes["a"] = iter([AssertionError("a bug")])
        one.send(record("a"))
        with pytest.raises(AssertionError, match="a bug"):
            await one.publisher.watch()


# -- topics ------------------------------------------------------------------------------------------------------------------


async def test_topics_that_were_made_since_are_seen_after_a_refresh() -> None:
    async with opened() as one:
        one.broker.topics["new"] = 7
        assert one.publisher.topics.partitions("new") is None
        one.broker.blind = iter([KafkaConnectionError()])  # and a look that fails is repeated
        await one.publisher.refresh_topics()
        assert one.publisher.topics.partitions("new") == 7


async def test_a_topic_that_was_deleted_is_noticed_without_being_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publisher, "_TOPICS_AGE_S", 0.01)
    async with opened() as one:
        del one.broker.topics["replies"]
        await wait_until(lambda: one.publisher.topics.partitions("replies") is None)


async def test_callers_that_ask_for_topics_at_once_share_one_look() -> None:
    async with opened() as one:
        before = one.broker.looks
        await asyncio.gather(*(one.publisher.refresh_topics() for _ in range(10)))
        assert one.broker.looks == before + 1


async def test_topics_are_not_asked_for_more_often_than_their_least_age() -> None:
    directory = TopicDirectory(min_age_s=0.05)
    producer = Broker().common()
    await directory.refresh(producer, since=time.monotonic())
    began = time.monotonic()
    await directory.refresh(producer, since=began)
    assert directory.partitions("results") == 4
    assert time.monotonic() - began >= 0.04
