"""The connections to Redis: a small pool that survives time-outs and cancellation. The only module that imports redis.

redis-py finds the address, does TLS and says who we are; what comes back is read by `resp`, within bounds.

It stands on parts of redis-py that its documentation does not promise to keep: `ConnectionPool.make_connection`; the
argument `parser_class` and the base class of its own parsers; and `connect`, `pack_commands`, `send_packed_command`,
`read_response`, `can_read` and `disconnect(nowait=True)` of a connection. They were read and are tested in redis-py 8.0
and 8.1; look at them again before another major version is allowed.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

import msgspec
from redis._parsers.base import _AsyncRESPBase
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from embedq_consumer.cache.link import Command, LinkFailed, Reason, Refusal
from embedq_consumer.cache.resp import INCOMPLETE, BadReply, ErrorReply, ReplyReader
from embedq_consumer.cache.secret import BadCacheSetting

_FAILURES: Final = (RedisError, OSError, EOFError, ValueError)
"""What Redis, its client or anything else that listens on that port can do to a round trip. ValueError and EOFError
come from the client when the peer does not speak the protocol; TimeoutError is an OSError."""
_READ_BYTES: Final = 1 << 18
_TURNS: Final = 16
"""Of the event loop, in which an answer has to come and to be read: a megabyte takes eight."""


class RedisOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where Redis is and who we are.

    The files of TLS go with an address that begins with `rediss://`: authorities that sign Redis's certificate (the
    system's, if empty), and the certificate that we show, with its key if that is in a file of its own.
    """

    url: str
    username: str = ""
    password: str = ""
    ssl_cafile: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""

    def __repr__(self) -> str:
        return f"RedisOptions({'with' if self.url else 'without'} an address)"  # which may hold a password

    def check(self) -> None:
        """Read every file once, so that a wrong one is found at the start. Blocks.

        Raises:
            BadCacheSetting: naming the setting, without its prefix.
        """
        tls = {
            name.upper(): getattr(self, name)
            for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
            if getattr(self, name)
        }
        if tls and not self.url.startswith("rediss://"):
            raise BadCacheSetting(f"REDIS_{next(iter(tls))}: needs an address that begins with rediss://")
        if (self.username or self.password) and _has_credentials(self.url):
            raise BadCacheSetting(
                "REDIS_PASSWORD: cannot be set, nor a user name, when EMBEDQ_REDIS_URL has a password"
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise BadCacheSetting("REDIS_SSL_KEYFILE: needs EMBEDQ_REDIS_SSL_CERTFILE")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ssl_cafile:
                context.load_verify_locations(self.ssl_cafile)
        except OSError as error:
            raise BadCacheSetting(
                f"REDIS_SSL_CAFILE: expected a PEM file of certificates, {self.ssl_cafile}: {_why(error)}"
            ) from None
        try:
            if self.ssl_certfile:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile or None)
        except OSError as error:
            raise BadCacheSetting(
                f"REDIS_SSL_CERTFILE: expected PEM files of a certificate and its key, {self.ssl_certfile}: {_why(error)}"
            ) from None

    def client_options(self) -> dict[str, Any]:
        """What redis-py's connections take besides the address."""
        found: dict[str, Any] = {}
        if self.username or self.password:
            found |= {"username": self.username or None, "password": self.password or None}
        if self.ssl_cafile:
            found["ssl_ca_certs"] = self.ssl_cafile
        if self.ssl_certfile:
            found["ssl_certfile"] = self.ssl_certfile
            found["ssl_keyfile"] = self.ssl_keyfile or self.ssl_certfile
        return found


def _has_credentials(url: str) -> bool:
    try:
        found = urlsplit(url)
    except ValueError:  # redis-py will say so, too; the message may quote a password
        return False
    return bool(found.username or found.password) or not parse_qs(found.query).keys().isdisjoint(
        {"username", "password"}
    )


def _why(error: OSError) -> str:
    """The reason alone: OpenSSL's messages name lines of its source."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is something else"
    return error.strerror or type(error).__name__


class _Parser(_AsyncRESPBase):
    """What a connection of redis-py asks of its parser, answered by a `ReplyReader`."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._replies = ReplyReader()

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._replies = ReplyReader()

    async def can_read(self) -> bool:
        """Whether something came that nobody asked for."""
        return not self._replies.is_empty

    async def read_response(self, disable_decoding: bool = False) -> Any:
        """One answer. Redis's refusals are returned, as redis-py expects, except those of the connection itself.

        Raises:
            ConnectionError, InvalidResponse: of redis-py.
        """
        if self._stream is None:
            raise RedisConnectionError("closed")
        try:
            while (found := self._replies.next()) is INCOMPLETE:
                if not (data := await self._stream.read(_READ_BYTES)):
                    raise RedisConnectionError("closed")
                self._replies.feed(data)
        except BadReply as bad:
            raise InvalidResponse(str(bad)) from None
        if not isinstance(found, ErrorReply):
            return found
        try:
            error: Exception = self.parse_error(found.text)  # type: ignore[no-untyped-call]
        except (ValueError, IndexError):  # it names a node of a cluster in a form that no cluster uses
            error = ResponseError("unreadable")
        if isinstance(error, RedisConnectionError):
            raise error
        return error


class RedisLink:
    """A fixed number of connections to one Redis, opened when they are first needed.

    Invariants:

    - A connection serves one round trip at a time.
    - A connection whose round trip did not run to its end, or brought more than was asked for, is closed before it can be
      used again: a late reply must not answer the next command.
    - Each connection comes back to the pool, whatever happened to its round trip.
    - An answer takes a few megabytes at most, whatever the other side claims or sends.
    - Waiting for a connection costs no caller its time while Redis answers others: under load there are more round trips
      than connections, and none of them is late. A Redis that answers nobody costs a caller one time-out.

    Making one blocks, for TLS some ten milliseconds.

    Raises:
        ValueError: the address is not one that redis-py understands; its message may quote a password.
    """

    def __init__(self, options: RedisOptions, *, connect_timeout_s: float, connections: int) -> None:
        self._connect_timeout_s = connect_timeout_s
        # Only for its parsing of addresses: redis-py's pool may lose a connection when a release is cancelled.
        # RESP2, since the default RESP3 brings push messages, for which a cache has no use. No time-outs of
        # redis-py's own: one deadline spans a whole round trip. No driver_info: finding its version reads files.
        pool = ConnectionPool.from_url(
            options.url,
            protocol=2,
            parser_class=_Parser,
            socket_timeout=None,
            socket_connect_timeout=None,
            health_check_interval=0,
            driver_info=None,
            **options.client_options(),
        )
        self._connections: list[AbstractConnection] = [
            pool.make_connection()  # type: ignore[no-untyped-call]
            for _ in range(connections)
        ]
        _share_tls(self._connections)
        self._idle: asyncio.LifoQueue[AbstractConnection] = asyncio.LifoQueue()
        for connection in self._connections:
            self._idle.put_nowait(connection)
        self._answered_at = -math.inf  # on the event loop's clock

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send all commands in one write; one reply for each. `connect_timeout_s` more where it must first connect.

        Raises:
            LinkFailed: no connection, no reply in time, or not the reply of a Redis.
        """
        try:
            async with _Deadline(timeout_s, lambda: self._answered_at) as deadline:
                connection = await self._idle.get()
                deadline.begin()
                try:
                    replies = await self._converse(connection, commands, deadline)
                    self._answered_at = asyncio.get_running_loop().time()
                    return replies
                except BaseException:
                    # Not suspended here, so that a second cancellation cannot come in between.
                    await connection.disconnect(nowait=True)
                    raise
                finally:
                    self._idle.put_nowait(connection)
        except _FAILURES as error:
            # Not its message, which may quote what was sent.
            raise LinkFailed(_kind(error), _reason(error)) from None

    async def close(self, timeout_s: float) -> None:
        """Close every connection, each within `timeout_s`. Never raises."""
        for connection in self._connections:
            try:
                async with asyncio.timeout(timeout_s):
                    await connection.disconnect()
            except _FAILURES:
                continue  # it is closed all the same; only the peer's farewell is missing

    async def _converse(
        self, connection: AbstractConnection, commands: Sequence[Command], deadline: _Deadline
    ) -> list[Any]:
        """The replies. A connection that was open, but turns out to be closed, is opened once more."""
        is_new = not connection.is_connected
        if is_new:
            deadline.extend(self._connect_timeout_s)
        try:
            return await _send_and_read(connection, commands)
        except RedisConnectionError:
            if is_new:
                raise
        # Redis was restarted, or closed a connection that it thought idle: not a failure yet.
        await connection.disconnect(nowait=True)
        deadline.extend(self._connect_timeout_s)
        return await _send_and_read(connection, commands)


def _share_tls(connections: Sequence[AbstractConnection]) -> None:
    """One context for all, made now: making one reads every certificate of the system."""
    first, *others = connections
    if isinstance(first, SSLConnection):
        first.ssl_context.get()
        for connection in others:
            if isinstance(connection, SSLConnection):
                connection.ssl_context = first.ssl_context


async def _send_and_read(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    """Send all, then read as many replies.

    A SET that Redis refuses is a reply too, since Redis may be full and yet answer look-ups. Any other command that it
    refuses, or answers in another form than was asked for, has failed.
    """
    await connection.connect()  # type: ignore[no-untyped-call]
    writer = connection._writer  # noqa: SLF001  # redis-py does not say it otherwise
    if writer is not None and writer.transport.is_closing():
        # Lost since it was last used. From Python 3.12 on, a transport that has let go of its event loop fails in `writelines`
        # with an AttributeError, for which nobody would look.
        raise RedisConnectionError("closed")
    await connection.send_packed_command(connection.pack_commands(commands))
    replies: list[Any] = []
    for name, *arguments in commands:
        try:
            reply = await connection.read_response()
        except ResponseError as refusal:
            if name != b"SET":
                raise
            reply = Refusal(_code(refusal))
        if name == b"MGET" and not (isinstance(reply, list) and len(reply) == len(arguments)):
            raise InvalidResponse("MGET: expected one value for each key")
        replies.append(reply)
    if await connection.can_read():
        raise InvalidResponse("more replies than commands")
    return replies


def _code(refusal: ResponseError) -> str:
    """The word that Redis's refusals begin with, if it is one: what follows may quote keys."""
    word = str(refusal.status_code or refusal).split(" ", 1)[0]
    return word if word.isascii() and word.isupper() and len(word) <= 20 else "ERR"


def _reason(error: BaseException) -> Reason:
    """What kind of failure it is. redis-py wraps what the socket raised, which is then the context."""
    if isinstance(error, AuthenticationError):
        return "password"
    if isinstance(error, NoPermissionError):
        return "permission"
    if _tls_error(error) is not None:
        return "tls"
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "timeout"
    if isinstance(error, InvalidResponse | ValueError):
        return "protocol"
    return "refused" if isinstance(error, ResponseError | BusyLoadingError) else "connection"


def _kind(error: BaseException) -> str:
    """The failure's name; of a certificate that is not trusted OpenSSL's own words, such as an expired one."""
    tls = _tls_error(error)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return f"{type(tls).__name__}: {tls.verify_message}"
    return type(error).__name__ if tls is None else f"{type(tls).__name__}: {tls.reason}"


def _tls_error(error: BaseException) -> ssl.SSLError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


class _Deadline:
    """`asyncio.timeout`, but Redis is not charged for the event loop's own work.

    Under a backlog a turn of the loop takes some 20 ms, and a long answer is read in several of them: the time passes in
    `_TURNS` parts, of which each takes one turn at least. Before `begin` it counts from Redis's last answer to anybody.
    """

    def __init__(self, seconds: float, answered_at: Callable[[], float]) -> None:
        self._seconds = seconds
        self._answered_at = answered_at
        self._part = seconds / _TURNS
        self._left = seconds
        self._waits = True
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._part, self._passed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def begin(self) -> None:
        """A connection is free. The whole time counts from now on, unless Redis answered nobody meanwhile."""
        self._waits = False
        if self._loop.time() - self._answered_at() < self._seconds:
            self._left = self._seconds

    def extend(self, seconds: float) -> None:
        """Allow this much more time."""
        self._left += seconds

    def _passed(self) -> None:
        """One part of the time."""
        now = self._loop.time()
        self._left -= self._part
        if self._waits:
            self._left = max(self._left, self._answered_at() + self._seconds - now)
        if self._left > self._part / 2:
            self._timer = self._loop.call_at(now + self._part, self._passed)
        else:  # what came in this turn is read before
            self._timeout.reschedule(now)
