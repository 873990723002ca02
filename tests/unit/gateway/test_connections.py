"""Connections with bounds, over real sockets: what breaks a bound is told so and closed, and nobody else notices.

Time is not waited for: the sweep is told a later one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn

from embedq_gateway.http.connections import STATE, BoundedProtocol, Connections
from embedq_gateway.http.pace import Bounds
from tests.helpers.support import patient, wait_until

LATER = 100.0
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Server:
    """A server whose application answers `/` at once, `/body` when it has the body, `/echo` with it, `/early` before, `/large` with 64 MB, and
    `/held` when it is released."""

    def __init__(self, **bounds: Any) -> None:
        known = {"connections": 10, "head_bytes": 2000, "head_s": 10, "idle_s": 60, "body_bytes_per_s": 100}
        self.ended = 0
        self.connections = Connections(Bounds(**(known | bounds)), ended=self._end)
        self.released = asyncio.Event()
        self.disconnected = 0
        self.port = 0

    def _end(self) -> None:
        self.ended += 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            scope["state"][STATE] = self.connections
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b"ok"
        if scope["path"] in ("/body", "/echo"):
            more, received = True, b""
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.disconnected += 1
                    return
                received += message.get("body", b"")
                more = message.get("more_body", False)
            if scope["path"] == "/echo":
                offered = {b"upgrade", b"http2-settings"} & {name for name, _ in scope["headers"]}
                body = b"an offer" if offered else received
        if scope["path"] == "/held":
            await self.released.wait()
        if scope["path"] == "/large":
            body = bytes(64 << 20)
        headers = [(b"content-length", b"%d" % len(body))]
        await send(
            {
                "type": "http.response.start",
                "status": 413 if scope["path"] == "/early" else 200,
                "headers": headers,
            }
        )
        await send({"type": "http.response.body", "body": body})

    def sweep(self, seconds: float = LATER) -> None:
        self.connections.sweep(time.monotonic() + seconds)


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[Server]:
    app = Server(**bounds)
    config = uvicorn.Config(
        app, http=BoundedProtocol, ws="none", lifespan="on", log_config=None, access_log=False, port=0
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await wait_until(lambda: server.started or task.done(), what="the server")
        app.port = server.servers[0].sockets[0].getsockname()[1]
        yield app
    finally:
        app.released.set()
        # uvicorn would look for its end after a tenth of a second, and wait for another one.
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(patient(10)):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return int(head.split()[1]), await self.reader.readexactly(length)

    async def refusal(self) -> tuple[int, str]:
        """The status and code of an error, after which the connection ends."""
        status, body = await self.answer()
        assert await self.ended()
        return status, json.loads(body)["error"]["code"]

    async def ended(self) -> bool:
        async with asyncio.timeout(patient(10)):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def peer(server: Server) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


async def test_requests_follow_each_other_on_one_connection_and_may_be_sent_ahead() -> None:
    async with serving() as server, peer(server) as one:
        for _ in range(3):
            await one.send(REQUEST)
            assert await one.answer() == (200, b"ok")
        await one.send(REQUEST * 3)
        for _ in range(3):
            assert await one.answer() == (200, b"ok")
        await wait_until(lambda: server.connections.idle == 1, what="an idle connection")
        server.sweep(30)
        await one.send(REQUEST)
        assert await one.answer() == (200, b"ok")
        assert server.ended == 0


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
"""What Java's own HTTP client puts into its first request, whose body it sends nevertheless."""


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("length", "body"),
    [
        (b"transfer-encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
        (b"content-length: 5\r\n", b"hello"),
    ],
)
async def test_a_client_that_offers_another_protocol_is_answered_in_this_one(
    length: bytes, body: bytes, apart: bool
) -> None:
    async with serving() as server, peer(server) as one:
        head = b"POST /echo HTTP/1.1\r\nhost: x\r\n" + OFFER + length + b"\r\n"
        for _ in range(2):
            for piece in [head, body] if apart else [head + body]:
                await one.send(piece)
                await asyncio.sleep(0)
            assert await one.answer() == (200, b"hello")
        await one.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + OFFER + b"\r\n" + REQUEST)
        assert [await one.answer(), await one.answer()] == [(200, b"ok")] * 2
        await one.send(
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade\r\nupgrade: websocket\r\n\r\n"
        )
        assert await one.answer() == (200, b"ok")
        assert await one.ended()
        assert server.ended == 0


async def test_an_offer_does_not_get_around_the_bounds() -> None:
    async with serving() as server:
        async with peer(server) as one:
            await one.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + OFFER + b"a: " + b"x" * 3000 + b"\r\n\r\n")
            assert (await one.refusal())[1] == "head_too_large"
        async with peer(server) as one:
            await one.send(b"CONNECT somewhere:443 HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await one.refusal() == (400, "malformed_request")


async def test_a_head_that_comes_too_slowly_is_told_so() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(REQUEST[:-2])
        await wait_until(lambda: server.connections.idle < len(server.connections), what="a head under way")
        server.sweep()
        assert await one.refusal() == (408, "request_timeout")
        assert server.ended == 1


async def test_so_is_one_on_a_connection_that_had_an_answer_before() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(REQUEST)
        await one.answer()
        await wait_until(lambda: server.connections.idle == 1, what="an idle connection")
        await one.send(b"G")
        await wait_until(lambda: server.connections.idle == 0, what="a head under way")
        server.sweep()
        assert await one.refusal() == (408, "request_timeout")


async def test_a_body_that_comes_too_slowly_is_told_so_and_the_application_is_let_go() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nab")
        await wait_until(lambda: server.connections.idle < len(server.connections), what="a body under way")
        server.sweep()
        assert await one.refusal() == (408, "request_timeout")
        one.writer.close()
        await wait_until(lambda: server.disconnected == 1, what="the end of the request")


@pytest.mark.parametrize("pieces", [1, 50])
async def test_a_head_that_is_too_long_is_told_so_in_one_piece_or_many(pieces: int) -> None:
    async with serving() as server, peer(server) as one:
        head = b"GET / HTTP/1.1\r\nx-long: " + b"a" * 5000 + b"\r\n\r\n"
        step = len(head) // pieces + 1
        try:
            for start in range(0, len(head), step):
                await one.send(head[start : start + step])
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        assert await one.refusal() == (431, "head_too_large")


async def test_so_is_one_that_never_ends() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(b"GET / HTTP/1.1\r\nx-long: " + b"a" * 5000)
        assert await one.refusal() == (431, "head_too_large")


async def test_so_is_a_request_line() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await one.refusal() == (431, "head_too_large")


async def test_what_is_no_http_is_told_so() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(b"\x16\x03\x01 hello\r\n\r\n")
        assert await one.refusal() == (400, "malformed_request")


async def test_a_connection_that_never_asks_is_closed_without_a_word() -> None:
    async with serving() as server, peer(server) as one:
        await wait_until(lambda: len(server.connections) == 1, what="the connection")
        server.sweep(59)
        assert len(server.connections) == 1
        server.sweep()
        assert await one.ended()
        assert server.ended == 0, "idling breaks no bound"


async def test_a_request_that_takes_long_to_answer_is_left_alone() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(REQUEST.replace(b"/ ", b"/held ", 1))
        await wait_until(
            lambda: server.connections.idle < len(server.connections), what="a request under way"
        )
        server.sweep(1e6)
        server.released.set()
        assert await one.answer() == (200, b"ok")


async def test_a_client_that_is_refused_while_it_sends_gets_its_answer_and_may_go_on() -> None:
    async with serving() as server, peer(server) as one:
        size = 8 << 20
        await one.send(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(8):
            await one.send(bytes(size // 8))
        assert (await one.answer())[0] == 413
        await one.send(REQUEST)
        assert await one.answer() == (200, b"ok")


async def test_one_that_is_refused_and_sends_on_slowly_is_closed() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\na")
        assert (await one.answer())[0] == 413
        server.sweep(6)
        assert await one.ended()


async def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    async with serving() as server, peer(server) as one:
        await one.send(REQUEST.replace(b"/ ", b"/large ", 1))
        await wait_until(
            lambda: any(each._pace._stuck_since for each in server.connections._open), what="a stuck answer"
        )
        server.sweep(29)
        assert len(server.connections) == 1
        server.sweep(31)
        await wait_until(lambda: len(server.connections) == 0, what="the end of the connection")


async def test_one_connection_too_many_closes_the_one_that_was_idle_for_longest() -> None:
    async with (
        serving(connections=3) as server,
        peer(server) as one,
        peer(server) as two,
        peer(server) as three,
    ):
        for each in (one, two, three, one):
            await each.send(REQUEST)
            await each.answer()
        await wait_until(lambda: server.connections.idle == 3, what="idle connections")
        async with peer(server) as four:
            await four.send(REQUEST)
            assert await four.answer() == (200, b"ok")
            assert await two.ended()
            await one.send(REQUEST)
            assert await one.answer() == (200, b"ok")
            assert len(server.connections) == 3


async def test_where_all_are_busy_the_new_one_is_refused() -> None:
    async with serving(connections=1) as server, peer(server) as one:
        await one.send(REQUEST.replace(b"/ ", b"/held ", 1))
        await wait_until(
            lambda: server.connections.idle < len(server.connections), what="a request under way"
        )
        async with peer(server) as two:
            assert await two.refusal() == (503, "too_many_connections")
        server.released.set()
        assert await one.answer() == (200, b"ok")
