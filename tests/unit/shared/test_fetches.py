"""Fetches are written and read as aiokafka does it, whatever they hold."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from aiokafka.protocol.fetch import FetchRequest, FetchRequest_v4, FetchRequest_v11, FetchResponse_v11
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka.clients import _Connection
from embedq_shared.kafka.wire.fetches import Fetch, Fetched, QuickFetch

int16, int32, int64 = (st.integers(-(2**bits), 2**bits - 1) for bits in (15, 31, 63))
names = st.text(max_size=20)
fetched_partitions = st.tuples(
    int32,
    int16,
    int64,
    int64,
    int64,
    st.none() | st.lists(st.tuples(int64, int64), max_size=3),
    int32,
    st.none() | st.binary(max_size=50),
)
answers = st.tuples(
    int32,
    int16,
    int32,
    st.lists(st.tuples(names, st.lists(fetched_partitions, max_size=4)), max_size=4),
)
asked = st.tuples(
    int32,
    int32,
    int32,
    st.integers(0, 1),
    st.lists(st.tuples(names, st.lists(st.tuples(int32, int64, int32), max_size=4)), max_size=4),
    names,
)


@given(answers, st.binary(max_size=10))
def test_an_answer_is_read_as_aiokafka_reads_it(answer: tuple[Any, ...], before: bytes) -> None:
    written = FetchResponse_v11(*answer).encode()
    data = BytesIO(before + written)
    data.seek(len(before))  # behind its header
    assert Fetched.decode(data) == FetchResponse_v11.decode(written)


@given(answers, st.data())
def test_an_answer_that_was_cut_is_none(answer: tuple[Any, ...], data: st.DataObject) -> None:
    written = FetchResponse_v11(*answer).encode()
    cut = data.draw(st.integers(0, len(written) - 1))
    with pytest.raises(ValueError, match=r"too early|codec can't decode"):
        Fetched.decode(BytesIO(written[:cut]))


@given(asked)
def test_a_request_is_written_as_aiokafka_writes_it(fetch: tuple[Any, ...]) -> None:
    versions = {1: (4, 17)}
    quick = QuickFetch(*fetch).prepare(versions)
    assert isinstance(quick, Fetch)
    assert quick.encode() == FetchRequest(*fetch).prepare(versions).encode()
    assert FetchRequest._CLASSES[-1] is FetchRequest_v11, "aiokafka knows a newer version"


def test_an_older_broker_is_asked_as_aiokafka_asks_it() -> None:
    assert type(QuickFetch(1, 2, 3, 0, []).prepare({1: (0, 4)})) is FetchRequest_v4


def test_fetches_of_our_clients_are_of_this_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(_Connection.__base__, "send", lambda self, request, expect: sent.append(request))
    _Connection.__new__(_Connection).send(FetchRequest(1, 2, 3, 0, []))
    assert isinstance(sent[0], QuickFetch)
