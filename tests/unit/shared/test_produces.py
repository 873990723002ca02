"""Requests to write records are written as aiokafka does it, whatever they hold, and go out in one piece."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.produce import ProduceRequest, ProduceRequest_v3, ProduceRequest_v7
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka.clients import _Connection
from embedq_shared.kafka.wire.produces import Produce, QuickProduce

int16, int32 = (st.integers(-(2**bits), 2**bits - 1) for bits in (15, 31))
names = st.text(max_size=20)
records = st.binary(max_size=50) | st.binary(max_size=50).map(bytearray)
produces = st.tuples(
    st.none() | names,
    int16,
    int32,
    st.lists(st.tuples(names, st.lists(st.tuples(int32, records), max_size=4)), max_size=4),
)
VERSIONS = {0: (3, 12)}


class Wire:
    """Where a connection writes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def connected(kind: type[AIOKafkaConnection], versions: dict[int, tuple[int, int]]) -> Any:
    """A connection of this kind whose other side says nothing."""
    connection: Any = AIOKafkaConnection("nowhere", 1, client_id="test")
    connection.__class__ = kind
    connection._writer = Wire()
    connection._versions = versions
    return connection


@given(produces)
def test_a_request_is_written_as_aiokafka_writes_it(produce: tuple[Any, ...]) -> None:
    quick = QuickProduce(*produce).prepare(VERSIONS)
    assert isinstance(quick, Produce)
    assert quick.encode() == ProduceRequest(*produce).prepare(VERSIONS).encode()
    assert ProduceRequest._CLASSES[-1] is ProduceRequest_v7, "aiokafka knows a newer version"


def test_an_older_broker_is_written_to_as_aiokafka_does_it() -> None:
    assert type(QuickProduce(None, -1, 1, []).prepare({0: (0, 3)})) is ProduceRequest_v3


@pytest.mark.parametrize("versions", [VERSIONS, {0: (0, 3)}], ids=["a broker of today", "an older one"])
async def test_our_connections_write_what_aiokafkas_do_and_wait_for_the_answer(
    versions: dict[int, tuple[int, int]],
) -> None:
    written = []
    for kind in (AIOKafkaConnection, _Connection):
        connection = connected(kind, versions)
        request = ProduceRequest(None, -1, 1000, [("t", [(0, bytearray(b"some")), (3, b"more")]), ("u", [])])
        answer = asyncio.ensure_future(connection.send(request))
        written.append(connection._writer.written)
        [(number, sent, waiting)] = connection._requests
        assert number == connection._correlation_id, "the answer is known by the number that was sent"
        assert sent.RESPONSE_TYPE.API_VERSION == sent.API_VERSION
        waiting.set_result("the answer")
        assert await answer == "the answer"
    theirs, ours = written
    assert ours == theirs
    assert len(ours) == 1


async def test_a_request_without_an_answer_waits_for_nothing_but_the_socket() -> None:
    connection = connected(_Connection, VERSIONS)
    connection._writer.drain = lambda: "drained"
    assert connection.send(ProduceRequest(None, 0, 1, []), expect_response=False) == "drained"
    assert connection._requests == type(connection._requests)()
