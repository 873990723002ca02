"""Connections with bounds. Uvicorn has none for heads, slow peers or silent ones: its protocol class is given them here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedq_gateway.errors import ApiError
from embedq_gateway.http.pace import Bounds, Pace

STATE: Final = "connections"
"""Where the lifespan's state has the `Connections` of this process."""
_OFFERS: Final = (b"upgrade", b"http2-settings")
"""Headers of an offer to speak another protocol."""
_LINE_AND_COLONS: Final = 4
"""Bytes of each header besides its name and value."""


class Connections:
    """The open connections of this process, and which of them are idle, the longest first."""

    def __init__(self, bounds: Bounds, *, ended: Callable[[], object] = lambda: None) -> None:
        """`ended` is called for each connection that breaks a bound."""
        self.bounds = bounds
        self.ended = ended
        self._open: set[BoundedProtocol] = set()
        self._idle: dict[BoundedProtocol, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def idle(self) -> int:
        """Those that wait for a request."""
        return len(self._idle)

    def opened(self, connection: BoundedProtocol) -> bool:
        """Another one; whether there is room for it."""
        if len(self._open) >= self.bounds.connections:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            self.closed(oldest)
            oldest.hang_up()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def busy(self, connection: BoundedProtocol) -> None:
        """It sends a request."""
        self._idle.pop(connection, None)

    def rests(self, connection: BoundedProtocol) -> None:
        """Its request is answered."""
        if connection in self._open:
            self._idle[connection] = None

    def closed(self, connection: BoundedProtocol) -> None:
        """It is gone, or about to be."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def sweep(self, now: float) -> None:
        """End those that take too long, at monotonic seconds `now`. A millisecond for some thousands."""
        for connection in list(self._open):
            connection.check(now)


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 over httptools, with `Bounds`; they are in the lifespan's state."""

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self._all: Connections = app_state[STATE]
        self._pace = Pace(self._all.bounds, time.monotonic())
        self._over = False

    # -- asyncio's callbacks ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Another peer."""
        super().connection_made(transport)
        if not self._all.opened(self):
            self._refuse("too_many_connections", "too many connections: try again", swept=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """A peer is gone."""
        self._all.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._over:
            return
        self._all.busy(self)
        self._pace.received(len(data), time.monotonic())
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._pace.too_long_a_head:
            self._refuse_head()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if not self._over:
                self._stay(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _stay(self, rest: bytes) -> None:
        """A client offers another protocol, as Java's own HTTP client offers h2c with every first request, and sends its request
        nevertheless. The offer is not taken up. The parser has taken it for the end of the request, so it gets the head
        anew, without the offer, and then the rest.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This is no proxy.")
            return
        tokens = [
            token.strip()
            for name, value in self.headers
            if name == b"connection"
            for token in value.split(b",")
            if token.strip().lower() not in _OFFERS
        ]
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", *_OFFERS)]
        if tokens:
            kept.append((b"connection", b", ".join(tokens)))
        line = b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())
        head = [line, *(b"%s: %s" % header for header in kept), b"", b""]
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # httptools before 0.6.3; as uvicorn does
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._parse(b"\r\n".join(head) + rest)

    def pause_writing(self) -> None:
        """The peer does not read."""
        self._pace.stuck(time.monotonic())
        super().pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._pace.flows()
        super().resume_writing()

    # -- the parser's callbacks ---------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """A head has come whole, perhaps with one piece of data that is larger than a head may be."""
        if self.parser.should_upgrade():
            return  # it comes again, see `_stay`
        if not self._pace.short_enough_a_head and self._head_size() > self._all.bounds.head_bytes:
            self._refuse_head()
        if not self._over:
            self._all.busy(self)
            self._pace.head_ended(time.monotonic())
            super().on_headers_complete()

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + _LINE_AND_COLONS for name, value in self.headers)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        if not self._over and not self.parser.should_upgrade():
            self._pace.body_ended(time.monotonic())
            super().on_message_complete()
            self._note_idle()

    def on_response_complete(self) -> None:
        """An answer is written."""
        self._pace.answered(time.monotonic(), next_one=bool(self.pipeline))
        self._note_idle()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse("malformed_request", "expected an HTTP/1.1 request")

    # -- bounds -------------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """End this connection if its peer takes too long."""
        late = self._pace.late(now)
        if late is None:
            return
        answered = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if late.tell and not answered:
            self._refuse("request_timeout", late.why)
        else:
            if self._pace.phase != "idle":
                self._all.ended()
            self.hang_up()

    def hang_up(self) -> None:
        """Close, whether or not the peer takes what is still to be sent."""
        self._over = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _note_idle(self) -> None:
        if self._pace.phase == "idle":
            self._all.rests(self)

    def _refuse_head(self) -> None:
        most = self._all.bounds.head_bytes
        self._refuse("head_too_large", f"expected a head of at most {most:,} bytes")

    def _refuse(self, code: str, message: str, *, swept: bool = True) -> None:
        """Answer in place of the application, which has not begun to, and close once the peer has, or a few seconds later:
        one that is cut off while it sends may lose the answer. A connection that there was no room for is closed at once.
        """
        self._over = True
        self._all.ended()
        error = ApiError(code, message)
        body = msgspec.json.encode(error.answer())
        lines = [
            b"HTTP/1.1 %d %s" % (error.status, HTTPStatus(error.status).phrase.encode()),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            *(b"%s: %s" % header for header in error.answer_headers()),
        ]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        if swept and self.transport.can_write_eof():
            self._pace.refused(time.monotonic())
            self.transport.write_eof()
        else:
            self.transport.close()
