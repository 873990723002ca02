"""The connections to Redis, against a peer that answers what the test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from embedq_consumer.cache.link import LinkFailed, Reason, Refusal
from embedq_consumer.cache.redis_link import RedisLink, RedisOptions

PING = [(b"PING",)]


class Peer:
    """Answers each write with `answer`, or with nothing if that is None."""

    def __init__(self) -> None:
        self.answer: bytes | None = b"+PONG\r\n"
        self.delay_s = 0.0
        self.connections = 0
        self.received = b""
        self._writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            while received := await reader.read(1 << 16):
                self.received += received
                await asyncio.sleep(self.delay_s)
                if self.answer is not None:
                    writer.write(self.answer)
                    await writer.drain()
        writer.close()

    def hang_up(self) -> None:
        """Close every connection, as a Redis that thinks them idle."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    one = Peer()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield one
        one.hang_up()


@pytest.fixture
async def link(peer: Peer) -> AsyncIterator[RedisLink]:
    one = RedisLink(RedisOptions(url=peer.url), connect_timeout_s=10, connections=1)
    yield one
    await one.close(5)


async def test_each_command_has_its_reply_and_the_connection_is_kept(peer: Peer, link: RedisLink) -> None:
    assert await link.exchange(PING, 10) == [b"PONG"]
    peer.answer = b"*2\r\n$1\r\nx\r\n$-1\r\n"
    assert await link.exchange([(b"MGET", b"a", b"b")], 10) == [[b"x", None]]
    peer.answer = b"+OK\r\n+OK\r\n"
    assert await link.exchange([(b"SET", b"a", b"1"), (b"SET", b"b", b"2")], 10) == [b"OK", b"OK"]
    assert peer.connections == 1


async def test_a_refused_set_is_a_reply(peer: Peer, link: RedisLink) -> None:
    peer.answer = b"-OOM command not allowed\r\n+OK\r\n"
    refusal, taken = await link.exchange([(b"SET", b"a", b"1"), (b"SET", b"b", b"2")], 10)
    assert refusal == Refusal("OOM")
    assert taken == b"OK"


@pytest.mark.parametrize(
    ("answer", "failure", "reason"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "BusyLoadingError", "refused"),
        (b"-ERR unknown command\r\n", "ResponseError", "refused"),
        (
            b"-NOPERM this user has no permissions to run the 'mget' command\r\n",
            "NoPermissionError",
            "permission",
        ),
        (b"-NOAUTH Authentication required.\r\n", "AuthenticationError", "password"),
        (b"-MOVED\r\n", "ResponseError", "refused"),
        (b"*1\r\n$-1\r\n", "InvalidResponse", "protocol"),  # one value for two keys
        (b"*3\r\n$-1\r\n$-1\r\n$-1\r\n", "InvalidResponse", "protocol"),
        (b"*-1\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n:1\r\n:2\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n+a\r\n-ERR b\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n*1\r\n$1\r\nx\r\n$-1\r\n", "InvalidResponse", "protocol"),
        (b"*1\r\n" * 100_000, "InvalidResponse", "protocol"),
        (b"*99999999999999999999\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n$99999999999\r\nx", "InvalidResponse", "protocol"),
        (b"*2\r\n$-2\r\n", "InvalidResponse", "protocol"),
        (b"$" + b"1" * 10_000, "InvalidResponse", "protocol"),
        (b">2\r\n+invalidate\r\n*0\r\n", "InvalidResponse", "protocol"),
        (b"%1\r\n+a\r\n+b\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n$-1\r\n$-1\r\n+one more\r\n", "InvalidResponse", "protocol"),
        (b":7\r\n", "InvalidResponse", "protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "InvalidResponse", "protocol"),
        (b"*2\r\n$-1\r\n", "TimeoutError", "timeout"),  # half of it, then silence
        (b"*2\r\n$100\r\nhalf", "TimeoutError", "timeout"),
    ],
)
async def test_any_other_refusal_or_form_fails_and_the_connection_is_not_used_again(
    peer: Peer, link: RedisLink, answer: bytes, failure: str, reason: Reason
) -> None:
    await link.exchange(PING, 10)  # a connection that must first be opened has the time for that besides
    peer.answer = answer
    with pytest.raises(LinkFailed, match=failure) as caught:
        await link.exchange([(b"MGET", b"a", b"b")], 0.2 if reason == "timeout" else 10)
    assert caught.value.reason == reason
    before = peer.connections
    peer.answer = b"+PONG\r\n"
    assert await link.exchange(PING, 10) == [b"PONG"]
    assert peer.connections == before + 1


async def test_what_was_sent_is_not_in_the_failure(peer: Peer, link: RedisLink) -> None:
    peer.answer = b"-ERR unknown secret\r\n"
    with pytest.raises(LinkFailed) as caught:
        await link.exchange([(b"GET", b"secret")], 10)
    assert str(caught.value) == "ResponseError"
    assert caught.value.__suppress_context__


async def test_a_peer_that_says_nothing_fails_in_time_and_its_late_reply_answers_nobody(
    peer: Peer, link: RedisLink
) -> None:
    await link.exchange(PING, 10)
    peer.answer = None
    with pytest.raises(LinkFailed, match="TimeoutError"):
        await link.exchange(PING, 0.01)
    peer.answer = b"+PONG\r\n"
    assert await link.exchange(PING, 10) == [b"PONG"]
    assert peer.connections == 2


async def test_a_long_answer_is_read_in_time_by_a_loop_whose_turns_are_long(
    peer: Peer, link: RedisLink
) -> None:
    """As under a backlog: what the loop does itself, between two reads of an answer, is no time of Redis's."""
    await link.exchange(PING, 10)
    keys = [b"%d" % number for number in range(512)]
    peer.answer = b"*512\r\n" + b"$1584\r\n%s\r\n" % (b"v" * 1584) * 512

    async def work() -> None:
        while True:
            time.sleep(0.02)  # noqa: ASYNC251  # it holds the loop
            await asyncio.sleep(0)

    working = asyncio.create_task(work())
    try:
        (values,) = await link.exchange([(b"MGET", *keys)], 0.05)
    finally:
        working.cancel()
    assert values == [b"v" * 1584] * 512


async def test_a_connection_that_was_closed_meanwhile_is_opened_once_more(
    peer: Peer, link: RedisLink
) -> None:
    await link.exchange(PING, 10)
    peer.hang_up()
    assert await link.exchange(PING, 10) == [b"PONG"]
    assert peer.connections == 2


@pytest.mark.parametrize("told", [False, True])
async def test_nothing_is_written_to_a_connection_that_is_lost(
    peer: Peer, link: RedisLink, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    """Python 3.12's transports fail there with an AttributeError, which ended the process."""
    await link.exchange(PING, 10)
    writer = link._connections[0]._writer
    assert writer is not None
    written: list[object] = []
    monkeypatch.setattr(writer, "writelines", written.append)
    writer.transport.abort()
    if told:
        await writer.wait_closed()
    assert await link.exchange(PING, 10) == [b"PONG"]
    assert (written, peer.connections) == ([], 2)


async def test_nothing_that_listens_is_a_failure() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    link = RedisLink(RedisOptions(url=f"redis://127.0.0.1:{port}"), connect_timeout_s=10, connections=1)
    for _ in range(3):
        with pytest.raises(LinkFailed, match="ConnectionError"):
            await link.exchange(PING, 10)
    await link.close(1)


async def test_a_cancelled_round_trip_gives_its_connection_back(peer: Peer, link: RedisLink) -> None:
    await link.exchange(PING, 10)
    peer.answer = None
    asked = asyncio.ensure_future(link.exchange(PING, 10))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    peer.answer = b"+PONG\r\n"
    assert await link.exchange(PING, 10) == [b"PONG"]


async def test_callers_wait_for_a_connection_within_their_time(peer: Peer, link: RedisLink) -> None:
    peer.answer = None
    first = asyncio.ensure_future(link.exchange(PING, 10))
    await asyncio.sleep(0)
    with pytest.raises(LinkFailed, match="TimeoutError"):
        await link.exchange(PING, 0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_caller_waits_for_a_connection_as_long_as_redis_answers_others(
    peer: Peer, link: RedisLink
) -> None:
    """Five round trips over one connection, each of half the time that a caller has."""
    peer.delay_s = 0.2
    asked = [asyncio.ensure_future(link.exchange(PING, 0.4)) for _ in range(5)]
    assert await asyncio.gather(*asked) == [[b"PONG"]] * 5


async def test_a_redis_that_stops_answering_costs_those_who_wait_one_time_out(
    peer: Peer, link: RedisLink
) -> None:
    assert await link.exchange(PING, 10) == [b"PONG"]
    peer.answer = None
    asked = [asyncio.ensure_future(link.exchange(PING, 0.3)) for _ in range(5)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [LinkFailed] * 5
    # One after the other, each with a time of its own, they would all have sent theirs.
    assert peer.received.count(b"PING") <= 3
