"""What the adapter asks of aiokafka's producer, and how it ends one that does not end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError, UnknownTopicOrPartitionError
from structlog.testing import capture_logs

from embedq_consumer.delivery import kafka_producer
from embedq_consumer.delivery.kafka_producer import KafkaProducer, producers
from embedq_consumer.delivery.outgoing import Outgoing


class Cluster:
    def topics(self, exclude_internal: bool) -> set[str]:
        assert not exclude_internal
        return {"a", "b"}

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return {"a": {0, 1, 2}}.get(topic)


class Client:
    """aiokafka's connections."""

    def __init__(self) -> None:
        self.updates = 0
        self.closed = False

    async def force_metadata_update(self) -> None:
        self.updates += 1

    async def fetch_all_metadata(self) -> Cluster:
        return Cluster()

    async def close(self) -> None:
        self.closed = True


class Sender:
    """The background task that a cancelled `stop` leaves running."""

    def __init__(self) -> None:
        self.sender_task: asyncio.Task[Any] | None = None


class Underlying(AIOKafkaProducer):  # type: ignore[misc]  # aiokafka has no type information
    """As much of aiokafka's producer as the adapter uses."""

    def __init__(self) -> None:
        self._closed = True  # for the destructor of the class that is stood in for
        self.client = Client()
        self._sender = Sender()
        self.partitions = [{0, 1}]
        self.sent: dict[str, Any] = {}
        self.flushed = False
        self.stop_hangs = False

    async def send(self, topic: str, **parts: Any) -> asyncio.Future[None]:
        self.sent = {"topic": topic, **parts}
        return asyncio.get_running_loop().create_future()

    async def flush(self) -> None:
        self.flushed = True

    async def partitions_for(self, topic: str) -> set[int]:
        if topic == "unknown":
            raise UnknownTopicOrPartitionError
        return self.partitions.pop(0) if len(self.partitions) > 1 else self.partitions[0]

    async def stop(self) -> None:
        if self.stop_hangs:
            await asyncio.Event().wait()


def adapted() -> tuple[KafkaProducer, Underlying]:
    underlying = Underlying()
    return KafkaProducer(underlying), underlying


async def test_a_record_is_sent_with_all_that_it_has() -> None:
    producer, underlying = adapted()
    outgoing = Outgoing(topic="t", partition=3, key=b"k", value=b"v", headers=[("h", b"1")], timestamp_ms=12)
    assert not (await producer.send(outgoing)).done()
    assert underlying.sent == {
        "topic": "t",
        "partition": 3,
        "key": b"k",
        "value": b"v",
        "headers": [("h", b"1")],
        "timestamp_ms": 12,
    }
    await producer.flush()
    assert underlying.flushed


@pytest.mark.parametrize(
    ("topic", "partition", "missing", "updates"),
    [
        ("t", None, False, 0),
        ("t", 1, False, 0),
        ("unknown", None, True, 0),
        ("unknown", 1, True, 0),
        ("t", 2, True, 1),
    ],
)
async def test_a_topic_or_partition_that_the_brokers_do_not_have_is_missing(
    topic: str, partition: int | None, missing: bool, updates: int
) -> None:
    producer, underlying = adapted()
    assert await producer.is_missing((topic, partition)) == missing
    assert underlying.client.updates == updates


async def test_a_partition_of_a_topic_that_grew_is_found_after_another_look() -> None:
    producer, underlying = adapted()
    underlying.partitions = [{0, 1}, {0, 1, 2}]
    assert not await producer.is_missing(("t", 2))


async def test_every_topic_has_its_number_of_partitions() -> None:
    producer, _ = adapted()
    assert await producer.partition_counts() == {"a": 3, "b": 0}


async def test_a_producer_that_stops_is_left_in_peace() -> None:
    producer, underlying = adapted()
    await producer.abandon()
    assert not underlying.client.closed


async def test_a_producer_whose_stop_hangs_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_producer, "_CLOSE_S", 0.01)
    producer, underlying = adapted()
    underlying.stop_hangs = True
    task = underlying._sender.sender_task = asyncio.ensure_future(asyncio.Event().wait())
    with capture_logs() as logs:
        await producer.abandon()
    assert task.cancelled()
    assert underlying.client.closed
    assert [(line["event"], line["reason"]) for line in logs] == [("producer_abandoned", "TimeoutError")]


async def test_a_producer_of_the_factory_is_idempotent_and_asks_for_every_acknowledgement() -> None:
    made = producers({"bootstrap_servers": "127.0.0.1:1"}, max_bytes=12345)()
    assert isinstance(made, KafkaProducer)
    underlying: AIOKafkaProducer = made._producer
    assert underlying._txn_manager is not None
    assert underlying._sender._acks == -1
    assert underlying._max_request_size == 12345
    with pytest.raises(KafkaConnectionError):
        await made.start()
    await made.abandon()
