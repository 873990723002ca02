"""The producer whose partitions fail one by one, over a cluster that is only a table: no socket is opened."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaConnectionError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.protocol.metadata import MetadataRequest, MetadataResponse_v5
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    BatchFull,
    Evicted,
    PartitionwiseProducer,
    partition_of,
)
from embedq_shared.kafka.clients import _Connection
from embedq_shared.kafka.producing import Company
from tests.helpers.support import wait_until

Answer = Callable[[int], int]


class Broker:
    """One broker that knows topics by name: for each partition the leader, 1 or -1. `error` is what it says of a partition."""

    def __init__(self) -> None:
        self.topics: dict[str, dict[int, int]] = {"t": {0: 1, 1: 1, 2: -1}}
        self.unauthorized: set[str] = set()
        self.error: dict[int, int] = {}
        self.requests: list[list[int]] = []
        self.written: list[list[Any]] = []
        """The records of each batch."""
        self.away = False
        self.asked = 0

    def metadata(self, topics: list[str] | None) -> MetadataResponse_v5:
        self.asked += 1
        named = self.topics.keys() if topics is None else topics
        return MetadataResponse_v5(
            0,
            [(1, "127.0.0.1", 1, None)],
            "cluster",
            1,
            [
                (
                    29 if name in self.unauthorized else 0 if name in self.topics else 3,
                    name,
                    False,
                    [(0, at, leader, [1], [1], []) for at, leader in self.topics.get(name, {}).items()],
                )
                for name in named
            ],
        )

    async def send(self, node: int, request: Any, **_: Any) -> Any:
        assert isinstance(request, ProduceRequest)
        if self.away:
            raise KafkaConnectionError("gone")
        asked = request._topics
        self.requests.append(sorted(at for _, partitions in asked for at, _ in partitions))
        for _, partitions in asked:
            for _, batch in partitions:
                self.written.append(list(MemoryRecords(bytes(batch)).next_batch()))
        await asyncio.sleep(0)
        return Answered(
            [
                (topic, [(at, self.error.get(at, 0), 7, -1, 0) for at, _ in partitions])
                for topic, partitions in asked
            ]
        )


class Answered:
    API_VERSION = 7

    def __init__(self, topics: list[Any]) -> None:
        self.topics = topics


@asynccontextmanager
async def producing(
    *, retries: bool = True, linger_ms: int = 0
) -> AsyncIterator[tuple[PartitionwiseProducer, Broker]]:
    broker = Broker()
    producer = PartitionwiseProducer(
        bootstrap_servers="127.0.0.1:1",
        retries=retries,
        ack_timeout_ms=1000,
        acks="all",
        max_request_size=1000,
        retry_backoff_ms=5,
        linger_ms=linger_ms,
    )

    async def update(cluster: Any, topics: Any) -> bool:
        if not broker.away:
            cluster.update_metadata(broker.metadata(sorted(topics) if topics else None))
        return not broker.away

    producer.client._metadata_update = update
    producer.client.send = broker.send
    producer.client._sync_task = asyncio.create_task(producer.client._md_synchronizer())
    await producer._sender.start()
    try:
        yield producer, broker
    finally:
        broker.error.clear()
        broker.away = False
        await producer.stop()


def append(producer: PartitionwiseProducer, partition: int, value: bytes = b"v") -> asyncio.Future[Any]:
    sent, count = producer.append("t", partition, [Record(value)])
    assert count == 1
    return sent


class Record(msgspec.Struct, frozen=True):
    value: bytes
    key: bytes | None = None
    headers: list[tuple[str, bytes]] = []
    timestamp_ms: int | None = None


async def test_a_record_is_acknowledged() -> None:
    async with producing() as (producer, _):
        await producer.look_up("t", 0)
        assert (await append(producer, 0)).offset == 7
        assert producer.alive


async def test_a_record_is_sent_two_rounds_of_the_loop_after_it_was_appended() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        await append(producer, 0)
        await _rounds(5)
        sent = append(producer, 0)
        await _rounds(2)
        assert broker.requests == [[0], [0]]
        await sent


async def test_what_comes_while_a_request_is_under_way_goes_with_the_next_one() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        await producer.look_up("t", 1)
        first = append(producer, 0)
        await _rounds(2)
        later = [append(producer, 0), append(producer, 1), append(producer, 0)]
        await asyncio.gather(first, *later)
        assert broker.requests == [[0], [0, 1]]


async def test_records_that_are_appended_together_have_one_answer_and_arrive_whole_and_in_order() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        records = [
            Record(b"%d" % n, key=b"k%d" % n, headers=[("n", b"%d" % n)], timestamp_ms=1000 + n)
            for n in range(20)
        ]
        records.append(Record(b"now"))
        before = time.time() * 1000
        sent, count = producer.append("t", 0, records[:7])
        later, more = producer.append("t", 0, records[7:])
        assert (count, more) == (7, 14)
        assert later is sent
        assert (await sent).offset == 7
        [written] = broker.written
        assert [(one.key, one.value, one.headers) for one in written] == [
            (one.key, one.value, one.headers) for one in records
        ]
        assert [one.timestamp for one in written[:-1]] == [one.timestamp_ms for one in records[:-1]]
        assert before - 1 <= written[-1].timestamp <= time.time() * 1000


async def test_of_records_that_go_into_no_batch_together_the_first_go_and_the_others_into_the_next() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        records = [Record(b"%02d" % n + bytes(800)) for n in range(50)]
        batches: list[asyncio.Future[Any]] = []
        left = records
        while left:
            sent, count = producer.append("t", 0, left)
            assert 1 <= count < 30  # of 16 KB
            batches.append(sent)
            left = left[count:]
        assert len({id(one) for one in batches}) == len(batches) == 3
        await asyncio.gather(*batches)
        assert [one.value[:2] for batch in broker.written for one in batch] == [
            b"%02d" % n for n in range(50)
        ]


async def test_a_record_too_large_is_refused_by_itself_and_those_around_it_are_appended() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        records = [Record(b"before"), Record(bytes(2000)), Record(b"after")]
        first, count = producer.append("t", 0, records)
        assert count == 1
        with pytest.raises(MessageSizeTooLargeError):
            producer.append("t", 0, records[1:])
        last, count = producer.append("t", 0, records[2:])
        assert count == 1
        await asyncio.gather(first, last)
        assert [one.value for batch in broker.written for one in batch] == [b"before", b"after"]


async def _rounds(count: int) -> None:
    """Of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_record_waits_for_others_only_where_others_came_just_before_it() -> None:
    company = Company(0.001)
    assert [company.linger_s(now) for now in (5.0, 5.0001, 5.0002)] == [0, 0, 0]  # in one turn
    assert company.linger_s(5.0015) == 0.001
    assert company.linger_s(5.0034) == 0.001
    assert company.linger_s(5.0055) == 0


@given(gaps=st.lists(st.floats(0, 0.0019), min_size=1, max_size=200))
def test_a_stream_without_a_pause_waits_from_its_second_turn_on(gaps: list[float]) -> None:
    company = Company(0.001)
    now = began = 5.0
    for gap in gaps:
        lingers = company.linger_s(now) > 0
        assert lingers or now - began < 0.0005
        now += gap


async def test_a_record_that_nobody_followed_is_sent_in_the_next_rounds_of_the_loop() -> None:
    async with producing(linger_ms=60_000) as (producer, broker):
        await producer.look_up("t", 0)
        await producer.look_up("t", 1)
        first, beside = append(producer, 0), append(producer, 1)
        assert (await asyncio.wait_for(asyncio.gather(first, beside), 5))[0].offset == 7
        assert broker.requests == [[0, 1]]


async def test_a_partition_that_is_evicted_fails_and_the_others_go_on() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        broker.error[0] = 19
        sick = append(producer, 0)
        await wait_until(lambda: producer.last_error("t", 0, 0) is not None)
        assert isinstance(producer.last_error("t", 0, 0), NotEnoughReplicasError)
        assert not sick.done()
        assert (await append(producer, 1)).offset == 7
        producer.evict("t", 0)
        with pytest.raises((Evicted, NotEnoughReplicasError)):
            await asyncio.wait_for(sick, 5)
        before = sum(0 in request for request in broker.requests)
        assert (await append(producer, 1)).offset == 7
        assert sum(0 in request for request in broker.requests) == before


async def test_what_is_appended_while_a_batch_is_tried_again_comes_after_it() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        broker.error[0] = 19
        first = append(producer, 0)
        await wait_until(lambda: producer.last_error("t", 0, 0) is not None)
        place = next(iter(producer._errors))
        await wait_until(lambda: place in producer._message_accumulator._batches)
        later = [append(producer, 0) for _ in range(3)]
        broker.error.clear()
        assert (await first).offset == 7
        assert len({id(one) for one in later}) == 1  # one batch
        assert (await later[0]).offset == 7


async def test_what_waits_for_a_partition_that_is_evicted_fails_at_once_and_in_silence() -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        broker.topics["t"][0] = -1
        await producer.client.force_metadata_update()
        waiting = append(producer, 0)
        producer.evict("t", 0)
        with pytest.raises(Evicted):
            await waiting
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_without_retries_each_failure_comes_with_its_reason() -> None:
    async with producing(retries=False) as (producer, broker):
        await producer.look_up("t", 0)
        broker.error[0] = 19
        with pytest.raises(NotEnoughReplicasError):
            await append(producer, 0)
        broker.error.clear()
        await append(producer, 0)
        broker.away = True
        with pytest.raises(KafkaConnectionError):
            await append(producer, 0)


@pytest.mark.parametrize("retries", [False, True])
async def test_after_a_failure_that_may_pass_the_brokers_are_asked_again_who_leads_the_partition(
    retries: bool,
) -> None:
    """aiokafka does so only for what it sends again. Else a producer would ask a former leader for ever."""
    async with producing(retries=retries) as (producer, broker):
        await producer.look_up("t", 0)
        broker.topics["t"][0] = -1  # it has just changed
        broker.error[0] = NotLeaderForPartitionError.errno
        sent = append(producer, 0)
        await wait_until(lambda: not producer.has_leader("t", 0), what="a look at who leads it")
        if not retries:
            with pytest.raises(NotLeaderForPartitionError):
                await sent
        broker.topics["t"][0] = 1


async def test_a_refused_record_is_no_reason_to_ask_who_leads_its_partition() -> None:
    async with producing(retries=False) as (producer, broker):
        await producer.look_up("t", 0)
        asked = broker.asked
        broker.error[0] = InvalidTimestampError.errno
        with pytest.raises(InvalidTimestampError):
            await append(producer, 0)
        await _rounds(10)
        assert broker.asked == asked


async def test_a_record_too_large_is_refused_and_a_full_batch_never_waits() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        with pytest.raises(MessageSizeTooLargeError):
            append(producer, 0, bytes(2000))
        broker.topics["t"][0] = -1
        await producer.client.force_metadata_update()
        sent: list[asyncio.Future[Any]] = []

        def fill() -> None:
            while True:
                sent.append(append(producer, 0, bytes(900)))

        with pytest.raises(BatchFull):
            fill()
        assert sent
        producer.evict("t", 0)
        await asyncio.wait(sent)
        assert all(isinstance(one.exception(), Evicted) for one in sent)


async def test_what_the_brokers_say_of_a_place() -> None:
    async with producing() as (producer, broker):
        assert not producer.has_leader("t", 0)
        await producer.look_up("t", 0)
        assert producer.has_leader("t", 0)
        assert not producer.has_leader("t", 2)
        with pytest.raises(LeaderNotAvailableError):
            await producer.look_up("t", 2)
        with pytest.raises(UnknownTopicOrPartitionError):
            await producer.look_up("t", 3)
        with pytest.raises(UnknownTopicOrPartitionError):
            await producer.look_up("unknown", 0)
        broker.unauthorized.add("secret")
        with pytest.raises(TopicAuthorizationFailedError):
            await producer.look_up("secret", 0)
        broker.away = True
        with pytest.raises(KafkaConnectionError):
            await producer.look_up("other", 0)


async def test_a_topic_that_is_forgotten_is_not_asked_for() -> None:
    async with producing() as (producer, broker):
        await producer.look_up("t", 0)
        assert producer.client._topics == {"t"}
        producer.forget("t")
        assert producer.client._topics == set()
        broker.topics["u"] = {0: 1}
        assert await producer.partition_counts() == {"t": 3, "u": 1}
        broker.away = True
        with pytest.raises(KafkaConnectionError):
            await producer.partition_counts()


@pytest.mark.parametrize("kind", [AIOKafkaProducer, AIOKafkaConsumer])
async def test_no_metadata_request_of_a_client_may_create_a_topic(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[MetadataRequest] = []
    connection = _Connection.__new__(_Connection)
    monkeypatch.setattr(
        "aiokafka.conn.AIOKafkaConnection.send", lambda self, request, expect_response: asked.append(request)
    )
    connected = kind(bootstrap_servers="127.0.0.1:1")
    connection_of = (connected.client if kind is AIOKafkaProducer else connected._client)._get_conn

    async def plain(self: Any, node: int, **_: Any) -> Any:
        connection.__class__ = _Connection.__mro__[1]
        return connection

    monkeypatch.setattr("aiokafka.client.AIOKafkaClient._get_conn", plain)
    (await connection_of(1)).send(MetadataRequest(["t"]))
    assert asked[0]._allow_auto_topic_creation is False
    await connected.stop()


@given(st.binary(max_size=300), st.integers(1, 1000))
def test_a_key_goes_where_aiokafka_would_put_it(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == DefaultPartitioner()(key, list(range(partitions)), [])


def test_a_key_goes_to_the_partition_where_kafkas_own_clients_put_it() -> None:
    # From Kafka's own test of its partitioner's hash, whose sign bit is taken off.
    assert [partition_of(key, 1 << 31) for key in (b"21", b"foobar", b"abc")] == [
        -973932308 & 0x7FFFFFFF,
        -790332482 & 0x7FFFFFFF,
        479470107,
    ]
