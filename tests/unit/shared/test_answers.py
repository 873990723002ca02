"""A broker's answers are cut out of what comes, however it comes, and go to whoever asked."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka.wire.answers import Answers, Frames
from tests.helpers.support import wait_until


def framed(body: bytes) -> bytes:
    return struct.pack(">i", len(body)) + body


@given(st.lists(st.binary(max_size=20), max_size=6), st.lists(st.integers(1, 12), min_size=1))
def test_answers_are_cut_out_of_pieces_of_any_size(bodies: Sequence[bytes], sizes: Sequence[int]) -> None:
    stream = b"".join(map(framed, bodies))
    frames, found, at = Frames(), [], 0
    for number in range(len(stream)):
        piece = stream[at : at + sizes[number % len(sizes)]]
        at += len(piece)
        found += frames.feed(piece)
    assert found == bodies


def test_an_answer_of_less_than_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="less than no bytes"):
        Frames().feed(struct.pack(">i", -1))


class Broker:
    """Takes connections; what it writes is up to the test."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []

    async def took(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection."""
        self.writers.append(writer)
        await reader.read()  # until the other side is done

    def answer(self, number: int, *versions: tuple[int, int, int]) -> bytes:
        """To the question which requests it knows."""
        body = struct.pack(">ihi", number, 0, len(versions))
        return framed(body + b"".join(struct.pack(">hhh", *version) for version in versions))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Any, Broker]]:
    """A connection whose answers are taken as they come."""
    broker = Broker()
    async with await asyncio.start_server(broker.took, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection: Any = AIOKafkaConnection("127.0.0.1", port, client_id="test", request_timeout_ms=30_000)
        opening = asyncio.create_task(connection.connect())
        await wait_until(lambda: bool(broker.writers))
        broker.writers[0].write(broker.answer(1))
        await opening
        Answers.take(connection)
        assert type(connection._protocol) is Answers
        try:
            yield connection, broker
        finally:
            connection.close()
            broker.writers[0].close()


def ask(connection: Any) -> asyncio.Future[Any]:
    asked: asyncio.Future[Any] = asyncio.ensure_future(connection.send(ApiVersionRequest()))
    return asked


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection asks in the first version, whatever it was told."""
    monkeypatch.setattr(ApiVersionRequest, "prepare", lambda self, versions: self._CLASSES[0]())


async def test_each_answer_goes_to_its_question_though_they_come_in_one_piece_or_byte_by_byte() -> None:
    async with connected() as (connection, broker):
        asked = [ask(connection) for _ in range(2)]
        await wait_until(lambda: len(connection._requests) == 2)
        broker.writers[0].write(broker.answer(2, (0, 0, 1)) + broker.answer(3, (0, 0, 2)))
        assert [(await each).api_versions for each in asked] == [[(0, 0, 1)], [(0, 0, 2)]]
        third = ask(connection)
        await wait_until(lambda: len(connection._requests) == 1)
        for byte in broker.answer(4, (0, 0, 3)):
            broker.writers[0].write(bytes([byte]))
            await broker.writers[0].drain()
        assert (await third).api_versions == [(0, 0, 3)]


async def test_a_connection_that_is_lost_fails_what_waits_as_before() -> None:
    async with connected() as (connection, broker):
        asked = ask(connection)
        await wait_until(lambda: len(connection._requests) == 1)
        broker.writers[0].close()
        with pytest.raises(KafkaConnectionError):
            await asked
        assert not connection.connected()


@pytest.mark.parametrize(
    "nonsense",
    [struct.pack(">i", -5), framed(b""), framed(struct.pack(">i", 99)), framed(struct.pack(">ihi", 2, 0, 7))],
    ids=["a size below zero", "nothing", "another number", "less than it says"],
)
async def test_an_answer_that_cannot_be_read_ends_the_connection(nonsense: bytes) -> None:
    async with connected() as (connection, broker):
        asked = ask(connection)
        await wait_until(lambda: len(connection._requests) == 1)
        broker.writers[0].write(nonsense)
        with pytest.raises(Exception, match=r"."):
            await asked
        await wait_until(lambda: not connection.connected())


async def test_answers_that_come_after_the_connection_was_closed_are_dropped() -> None:
    async with connected() as (connection, broker):
        protocol = connection._protocol
        connection.close()
        protocol.data_received(broker.answer(2))


async def test_while_a_question_is_open_its_answer_comes_the_former_way() -> None:
    async with connected() as (connection, broker):
        connection._protocol.__class__ = Answers.__mro__[1]
        connection._writer.transport.set_protocol(connection._protocol)
        asked = ask(connection)
        await wait_until(lambda: len(connection._requests) == 1)
        Answers.take(connection)
        assert type(connection._protocol) is not Answers
        broker.writers[0].write(broker.answer(2, (0, 0, 9)))
        assert (await asked).api_versions == [(0, 0, 9)]


async def test_a_connection_that_nobody_holds_is_collected() -> None:
    async with connected() as (connection, _):
        protocol = connection._protocol
        assert protocol.connection() is connection
        connection.close()
    del connection
    gc.collect()
    assert protocol.connection() is None
