"""Redis's answers, cut out of bytes that come in any pieces."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedq_consumer.cache.resp import INCOMPLETE, BadReply, ErrorReply, ReplyReader

values = st.none() | st.binary(max_size=40) | st.binary(min_size=3, max_size=3)


def written(value: Any) -> bytes:
    match value:
        case None:
            return b"$-1\r\n"
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(value), value)
        case int():
            return b":%d\r\n" % value
        case list():
            return b"*%d\r\n" % len(value) + b"".join(map(written, value))
    raise AssertionError(value)


def read(pieces: Iterable[bytes], limit: int = 1 << 20) -> list[Any]:
    """Every answer in these pieces."""
    reader, found = ReplyReader(limit), []
    for piece in pieces:
        reader.feed(piece)
        while (reply := reader.next()) is not INCOMPLETE:
            found.append(reply)
    return found


@given(st.lists(values | st.integers(-(2**63), 2**63 - 1) | st.lists(values, max_size=5)), st.data())
def test_answers_are_read_from_whatever_pieces_they_come_in(replies: list[Any], data: st.DataObject) -> None:
    whole = b"".join(map(written, replies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(pieces) == replies


def test_words_and_refusals_are_told_apart() -> None:
    ok, refusal = read([b"+OK\r\n-OOM command not allowed\r\n"])
    assert ok == b"OK"
    assert isinstance(refusal, ErrorReply)
    assert refusal.text == "OOM command not allowed"


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"*2\r\n", b"$3\r\n", b"\r\n", b"*1\r\n$1\r\n"])))
@example([b"*1\r\n"] * 5000)
@example([b"$1\r\nab\r\n"])
@example([b":+5\r\n"])
@example([b": 5\r\n"])
@example([b"$1_0\r\n"])
@example(["*１\r\n".encode()])
def test_whatever_comes_is_answers_or_no_answer(pieces: list[bytes]) -> None:
    with contextlib.suppress(BadReply):
        for reply in read(pieces, limit=100):
            assert reply is None or isinstance(reply, bytes | int | ErrorReply | list)
            if isinstance(reply, list):
                assert all(each is None or isinstance(each, bytes) for each in reply)


@pytest.mark.parametrize(
    "endless",
    [b"$-1\r\n", b"$60\r\n" + b"x" * 60 + b"\r\n"],
    ids=["nothing", "values"],
)
def test_a_list_is_left_where_it_is_longer_than_any_that_was_asked_for(endless: bytes) -> None:
    with pytest.raises(BadReply, match="too long"):
        read([b"*250\r\n", *[endless] * 250], limit=1000)


def test_what_is_only_claimed_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        for claim in (b"*1048576\r\n", b"$4194304\r\n"):
            reader = ReplyReader()
            reader.feed(claim)
            assert reader.next() is INCOMPLETE
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_line_without_an_end_is_not_waited_for() -> None:
    with pytest.raises(BadReply, match="line"):
        read([b"+", *[b"x" * 100] * 100])


def test_it_knows_whether_something_is_left_over() -> None:
    reader = ReplyReader()
    assert reader.is_empty
    reader.feed(b"+OK\r\n+")
    assert reader.next() == b"OK"
    assert not reader.is_empty
    reader.feed(b"\r\n")
    assert reader.next() == b""
    assert reader.is_empty
