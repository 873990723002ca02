"""The sender over producers in memory: batches, full partitions, refusals, broken producers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, TopicAuthorizationFailedError

from embedq_sdk.errors import InvalidArgument, KafkaRefused, KafkaUnavailable
from embedq_sdk.transport import job_sender
from embedq_sdk.transport.job_sender import Sender, share
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_shared.headers import Header
from embedq_shared.kafka import KafkaOptions
from tests.helpers.support import wait_until


class Batch:
    """Room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.values: list[bytes] = []
        self._room = room

    def append(self, *, timestamp: None, key: None, value: bytes, headers: list[Header]) -> object:
        if sum(map(len, self.values)) + len(value) > self._room:
            return None
        self.values.append(value)
        return object()

    def close(self) -> None:
        return


class Producer:
    """Keeps batches until the test acknowledges or refuses them."""

    def __init__(self, partitions: int = 2, room: int = 100) -> None:
        self._partitions = partitions
        self._room = room
        self.sent: list[tuple[int, list[bytes], asyncio.Future[object]]] = []
        self.failure: Exception | None = None
        self.stopped = False

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(self._partitions))

    def create_batch(self) -> Batch:
        return Batch(self._room)

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[object]:
        if self.failure is not None:
            raise self.failure
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.sent.append((partition, batch.values, future))
        return future

    async def stop(self) -> None:
        self.stopped = True


class Connection(KafkaConnection):
    """Hands out producers in turn; None stands for brokers that do not answer."""

    def __init__(self, *producers: Producer | KafkaRefused | None) -> None:
        super().__init__(KafkaOptions(servers="a:1"))
        self._producers = list(producers)

    async def connect(self, make: Callable[[], Any], timeout: float) -> Any:
        await asyncio.sleep(0)
        producer = self._producers.pop(0)
        if producer is None:
            raise self.unavailable("no answer")
        if isinstance(producer, KafkaRefused):
            raise producer
        return producer


def job(value: bytes = b"x", *, awaits_reply: bool = True) -> PendingJob:
    return PendingJob(
        asyncio.get_running_loop().create_future(),
        topic="t",
        value=value,
        headers=[],
        correlation=b"",
        count=1,
        size=1,
        timeout=1.0,
        awaits_reply=awaits_reply,
    )


@asynccontextmanager
async def running(*producers: Producer | KafkaRefused | None) -> AsyncIterator[Sender]:
    sender = Sender(Connection(*producers))
    await sender.open(1.0)
    task = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        task.cancel()
        await asyncio.wait({task})
        await sender.close()


def test_a_burst_reaches_every_partition_in_batches_that_are_worth_it() -> None:
    assert [share(waiting, 8) for waiting in (1, 128, 129, 800)] == [16, 16, 17, 100]


async def test_jobs_go_out_in_order_and_one_batch_a_partition_at_a_time() -> None:
    producer = Producer()
    async with running(producer) as sender:
        jobs = [job(b"%02d" % n) for n in range(40)]
        for each in jobs:
            sender.put(each)
        await wait_until(lambda: len(producer.sent) == 2)
        later = [job(b"later") for _ in range(3)]
        for each in later:
            sender.put(each)
        assert [value for _, values, _ in producer.sent for value in values] == [j.value for j in jobs]
        (partition, values, first), _ = producer.sent
        first.set_result(None)
        await wait_until(lambda: len(producer.sent) == 3)

        assert producer.sent[2][:2] == (partition, [b"later"] * 3)
        assert [each.acknowledged for each in jobs] == [True] * len(values) + [False] * (40 - len(values))
    assert producer.stopped


async def test_a_job_without_a_reply_ends_when_kafka_has_it() -> None:
    producer = Producer()
    async with running(producer) as sender:
        waiting, submitted = job(), job(awaits_reply=False)
        sender.put(waiting)
        sender.put(submitted)
        await wait_until(lambda: len(producer.sent) == 1)
        producer.sent[0][2].set_result(None)

        assert await submitted.future == []
        assert not waiting.future.done()


async def test_a_job_that_no_caller_waits_for_is_not_sent() -> None:
    producer = Producer()
    async with running(producer) as sender:
        given_up, wanted = job(b"given up"), job(b"wanted")
        given_up.drop()
        sender.put(given_up)
        sender.put(wanted)
        await wait_until(lambda: len(producer.sent) == 1)

        assert producer.sent[0][1] == [b"wanted"]


async def test_a_job_that_fits_no_batch_fails_alone() -> None:
    producer = Producer(room=10)
    async with running(producer) as sender:
        huge, small = job(b"h" * 11), job(b"small")
        sender.put(huge)
        sender.put(small)
        await wait_until(lambda: len(producer.sent) == 1)

        assert producer.sent[0][1] == [b"small"]
        with pytest.raises(InvalidArgument, match=r"max\.message\.bytes"):
            await huge.future


async def test_a_batch_that_the_broker_finds_too_large_is_sent_in_halves_down_to_the_job_that_is() -> None:
    producer = Producer(partitions=1)
    async with running(producer) as sender:
        jobs = [job(b"%d" % n) for n in range(4)]
        for each in jobs:
            sender.put(each)
        for sizes in ([4], [4, 2], [4, 2, 1]):
            await wait_until(lambda sizes=sizes: [len(sent[1]) for sent in producer.sent] == sizes)  # type: ignore[misc]
            producer.sent[-1][2].set_exception(MessageSizeTooLargeError())

        with pytest.raises(InvalidArgument):
            await jobs[0].future
        assert not sender.broken
        assert not any(each.future.done() for each in jobs[1:])


async def test_after_an_error_a_new_producer_sends_the_same_jobs_once_every_batch_has_come_back() -> None:
    broken, fine = Producer(), Producer()
    async with running(broken, None, fine) as sender:
        jobs = [job(b"%02d" % n) for n in range(40)]
        for each in jobs:
            sender.put(each)
        await wait_until(lambda: len(broken.sent) == 2)
        broken.sent[0][2].set_exception(KafkaError("gone"))
        await wait_until(lambda: sender.broken)
        assert fine.sent == []
        broken.sent[1][2].cancel()
        await wait_until(lambda: len(fine.sent) == 2)

        assert broken.stopped
        assert not sender.broken
        found = sorted(value for _, values, _ in fine.sent for value in values)
        assert found == sorted(value for _, values, _ in broken.sent for value in values)


async def test_a_batch_that_cannot_be_handed_over_stays_in_its_queue() -> None:
    broken, fine = Producer(), Producer()
    broken.failure = KafkaError("gone")
    async with running(broken, fine) as sender:
        sender.put(job(b"one"))
        await wait_until(lambda: len(fine.sent) == 1)

        assert fine.sent[0][1] == [b"one"]


async def test_opening_without_brokers_says_so() -> None:
    with pytest.raises(KafkaUnavailable, match="a:1"):
        await Sender(Connection(None)).open(1.0)


async def test_jobs_that_kafka_will_never_take_end_at_once_and_the_others_go_on() -> None:
    producer = Producer()
    async with running(producer) as sender:
        refused = job(b"refused")
        sender.put(refused)
        await wait_until(lambda: len(producer.sent) == 1)
        producer.sent[0][2].set_exception(TopicAuthorizationFailedError("t"))

        with pytest.raises(KafkaRefused, match="this user has no right to topic t"):
            await refused.future
        taken = job(b"taken", awaits_reply=False)
        sender.put(taken)
        await wait_until(lambda: len(producer.sent) == 2)
        producer.sent[1][2].set_result(None)
        assert await taken.future == []
        assert not sender.broken


async def test_a_topic_that_may_not_be_seen_ends_the_jobs_that_wait_for_it() -> None:
    producer, after = Producer(), Producer()
    producer.failure = TopicAuthorizationFailedError("t")
    async with running(producer, after) as sender:
        refused = job()
        sender.put(refused)
        with pytest.raises(KafkaRefused, match="this user has no right to topic t"):
            await refused.future
        assert after.sent == []


async def test_a_new_producer_that_is_refused_ends_what_waits_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_sender, "_REFUSED_PAUSE_S", 0.0)
    first, last = Producer(), Producer()
    refusal = KafkaRefused(servers="a:1", reason="the password")
    async with running(first, refusal, last) as sender:
        waiting = job()
        sender.put(waiting)
        await wait_until(lambda: len(first.sent) == 1)
        first.sent[0][2].set_exception(KafkaError("gone"))
        with pytest.raises(KafkaRefused, match="the password"):
            await waiting.future
        again = job()
        sender.put(again)
        await wait_until(lambda: len(last.sent) == 1)
