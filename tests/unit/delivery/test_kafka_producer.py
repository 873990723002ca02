"""What the adapter asks of aiokafka's producer, and how it ends one that does not end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from embedq_consumer.delivery import kafka_producer
from embedq_consumer.delivery.kafka_producer import KafkaProducer, KafkaProducers
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_shared.kafka import KafkaConnectionError, KafkaError, PartitionwiseProducer

NOBODY = {"bootstrap_servers": "127.0.0.1:1"}


class Connections:
    _sasl_mechanism = "PLAIN"

    def __init__(self) -> None:
        self.closed = False

    async def close(self) -> None:
        self.closed = True


class Sender:
    """The background task that a cancelled `stop` leaves running."""

    def __init__(self) -> None:
        self.sender_task: asyncio.Task[Any] | None = None


class Underlying(PartitionwiseProducer):
    """As much of the producer as the adapter uses."""

    def __init__(self) -> None:
        self._closed = True  # for the destructor of the class that is stood in for
        self.client = Connections()
        self._sender = Sender()
        self.appended: list[Any] = []
        self.stop_hangs = False

    async def start(self) -> None:
        pass

    def append(self, topic: str, partition: int, records: Sequence[Any]) -> tuple[asyncio.Future[Any], int]:
        self.appended = [topic, partition, *records]
        return asyncio.get_running_loop().create_future(), len(records)

    async def stop(self) -> None:
        if self.stop_hangs:
            await asyncio.Event().wait()


async def adapted() -> tuple[KafkaProducer, Underlying]:
    underlying = Underlying()
    producer = KafkaProducer(lambda: underlying)
    await producer.start()
    return producer, underlying


async def test_records_are_sent_to_the_place_that_was_chosen_for_them() -> None:
    producer, underlying = await adapted()
    outgoing = Outgoing(topic="t", partition=None, key=b"k", value=b"v", headers=[])
    sending, count = producer.send(("t", 3), [outgoing, outgoing])
    assert (sending.done(), count) == (False, 2)
    assert underlying.appended == ["t", 3, outgoing, outgoing]


async def test_a_producer_that_stops_is_left_in_peace() -> None:
    producer, underlying = await adapted()
    await producer.abandon()
    await producer.abandon()
    assert not underlying.client.closed
    assert not producer.alive


async def test_whoever_still_asks_a_producer_that_was_closed_is_told_so_as_of_a_broker() -> None:
    producer, _ = await adapted()
    await producer.abandon()
    with pytest.raises(KafkaConnectionError, match="the producer was closed"):
        await producer.partition_counts()
    with pytest.raises(KafkaConnectionError, match="the producer was closed"):
        await producer.look_up(("t", 0))


async def test_a_producer_whose_stop_hangs_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_producer, "_CLOSE_S", 0.01)
    producer, underlying = await adapted()
    underlying.stop_hangs = True
    task = underlying._sender.sender_task = asyncio.ensure_future(asyncio.Event().wait())
    with capture_logs() as logs:
        await producer.abandon()
    assert task.cancelled()
    assert underlying.client.closed
    assert [(line["event"], line["reason"]) for line in logs] == [("producer_abandoned", "TimeoutError")]


async def test_a_common_producer_is_idempotent_and_one_apart_sends_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kafka_producer, "_CONNECT_S", 0.2)
    made: list[PartitionwiseProducer] = []

    class Watched(PartitionwiseProducer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(kafka_producer, "PartitionwiseProducer", Watched)
    producers = KafkaProducers(NOBODY, max_bytes=12345)
    for producer in (producers.common(), producers.apart()):
        with pytest.raises(KafkaError):
            await producer.start()
        await producer.abandon()
    common, apart = made[0], made[-1]
    assert (common._retries, apart._retries) == (True, False)
    assert (common._txn_manager is None, apart._txn_manager is None) == (False, True)
    for each in made:
        assert each._sender._acks == -1
        assert each._max_request_size == 12345
        # The broker answers before the connection counts as hung.
        assert each._sender._request_timeout_ms < each._request_timeout_ms
