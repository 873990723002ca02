"""A request that carries records is written when it is made, and its answer waited for as aiokafka does."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    NodeNotReadyError,
    RequestTimedOutError,
)
from aiokafka.protocol.produce import ProduceRequest

from embedq_shared.kafka.clients import AIOKafkaProducer, KafkaConnections, _Connection


class Wire:
    """Where the connection writes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.written.append(b"closed")


class OpenReader:
    """The other side says nothing, and has not gone."""

    @staticmethod
    def at_eof() -> bool:
        return False


_made: list[Any] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Every connection is closed in the end."""
    yield
    while _made:
        _made.pop().close()


def connected(*, timeout_ms: int = 30_000) -> Any:
    """A connection whose other side says nothing."""
    connection: Any = AIOKafkaConnection("nowhere", 1, client_id="test", request_timeout_ms=timeout_ms)
    connection.__class__ = _Connection
    connection._reader, connection._writer = OpenReader(), Wire()
    connection._read_task = asyncio.get_running_loop().create_future()
    connection._closed_fut = asyncio.get_running_loop().create_future()
    connection._closed_fut.set_result(None)
    connection._versions = {0: (3, 12)}
    _made.append(connection)
    return connection


def client(connection: Any | None) -> Any:
    """A client that knows this broker as number 1, if there is one."""
    found: Any = AIOKafkaClient(bootstrap_servers="127.0.0.1:1")
    found.__class__ = KafkaConnections
    if connection is not None:
        found._conns[1, ConnectionGroup.DEFAULT] = connection
    return found


def produce(acks: int = -1) -> ProduceRequest:
    return ProduceRequest(None, acks, 1000, [("t", [(0, b"records")])])


async def test_a_request_is_written_before_anybody_waits_for_it_and_once() -> None:
    connection = connected()
    its = client(connection)
    request = produce()
    its.write(1, request)
    assert [b"records" in data for data in connection._writer.written] == [True]
    waiting = asyncio.create_task(its.send(1, request))
    await asyncio.sleep(0)
    connection._requests[0][2].set_result("the answer")
    assert await waiting == "the answer"
    assert len(connection._writer.written) == 1


async def test_a_request_that_is_not_answered_in_time_ends_its_connection() -> None:
    connection = connected(timeout_ms=1)
    its = client(connection)
    request = produce()
    its.write(1, request)
    with pytest.raises(RequestTimedOutError):
        await its.send(1, request)
    assert not connection.connected()


async def test_a_connection_that_is_lost_before_the_answer_fails_the_request() -> None:
    connection = connected()
    its = client(connection)
    request = produce()
    its.write(1, request)
    connection.close()
    with pytest.raises(KafkaConnectionError):
        await its.send(1, request)


async def test_without_a_connection_or_an_answer_to_wait_for_all_is_done_when_it_is_sent() -> None:
    its = client(None)
    request = produce()
    its.write(1, request)
    with pytest.raises(NodeNotReadyError):
        await its.send(1, request)
    connection = connected()
    client(connection).write(1, produce(acks=0))
    assert connection._writer.written == []


async def test_what_cannot_be_written_fails_where_it_is_waited_for() -> None:
    connection = connected()
    connection._versions = {}
    its = client(connection)
    request = produce()
    its.write(1, request)
    its.ready = lambda node, group: _true()
    with pytest.raises(IncompatibleBrokerVersion):
        await its.send(1, request)


async def _true() -> bool:
    return True


class Taken:
    """The broker has what was written."""

    API_VERSION = 7
    topics = (("t", [(0, 0, 7, -1, 0)]),)


@asynccontextmanager
async def producing(connection: Any) -> AsyncIterator[Any]:
    """A producer whose broker is connected; it knows that it leads the only partition."""
    producer: Any = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", linger_ms=0)
    producer.client._conns[1, ConnectionGroup.DEFAULT] = connection
    producer.client.cluster.leader_for_partition = lambda place: 1
    await producer._sender.start()
    try:
        yield producer
    finally:
        for _, _, waiting in connection._requests:
            waiting.set_result(Taken)
        await producer.stop()


async def test_a_producer_writes_in_the_round_in_which_its_sender_is_woken() -> None:
    connection = connected()
    async with producing(connection) as producer:
        await asyncio.sleep(0)
        batch = producer.create_batch()
        batch.append(timestamp=None, key=None, value=b"record")
        await producer._message_accumulator.add_batch(batch, TopicPartition("t", 0), 1)
        assert connection._writer.written == []
        await asyncio.sleep(0)
        [written] = connection._writer.written
        assert b"record" in written
        assert struct.unpack_from(">i", written)[0] == len(written) - 4
