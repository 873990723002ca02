"""The connections to Redis: a small pool that survives time-outs and cancellation. The only module that imports redis.

It stands on parts of redis-py that its documentation does not promise to keep: `ConnectionPool.make_connection`, and
`connect`, `pack_commands`, `send_packed_command`, `read_response` and `disconnect(nowait=True)` of a connection. They
were read and are tested in redis-py 8.0 and 8.1; look at them again before another major version is allowed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from embedq_consumer.cache.link import Command, LinkFailed

_FAILURES: Final = (RedisError, OSError, EOFError, ValueError)
"""What Redis, its client or anything else that listens on that port can do to a round trip. ValueError and EOFError
come from the client's parser when the peer does not speak the protocol; TimeoutError is an OSError."""


class RedisLink:
    """A fixed number of connections to one Redis, opened when they are first needed.

    Invariants:

    - A connection serves one round trip at a time.
    - A connection whose round trip did not run to its end is closed before it can be used again: a late reply must not
      answer the next command.
    - Each connection comes back to the pool, whatever happened to its round trip.

    Raises:
        ValueError: `url` is not an address that redis-py understands; its message may quote a password.
    """

    def __init__(self, url: str, *, connect_timeout_s: float, connections: int) -> None:
        self._connect_timeout_s = connect_timeout_s
        # Only for its parsing of addresses: redis-py's pool may lose a connection when a release is cancelled.
        # RESP2, since the default RESP3 brings push messages, for which a cache has no use. No time-outs of
        # redis-py's own: one deadline spans a whole round trip. No driver_info: finding its version reads files.
        pool = ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
            health_check_interval=0,
            driver_info=None,
        )
        self._connections: list[AbstractConnection] = [
            pool.make_connection()  # type: ignore[no-untyped-call]
            for _ in range(connections)
        ]
        self._idle: asyncio.LifoQueue[AbstractConnection] = asyncio.LifoQueue()
        for connection in self._connections:
            self._idle.put_nowait(connection)

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send all commands in one write; one reply for each. `connect_timeout_s` more where it must first connect.

        Raises:
            LinkFailed: no connection, no reply in time, or not the reply of a Redis.
        """
        try:
            async with _Deadline(timeout_s) as deadline:
                connection = await self._idle.get()
                try:
                    return await self._converse(connection, commands, deadline)
                except BaseException:
                    # Not suspended here, so that a second cancellation cannot come in between.
                    await connection.disconnect(nowait=True)
                    raise
                finally:
                    self._idle.put_nowait(connection)
        except _FAILURES as error:
            raise LinkFailed(type(error).__name__) from None  # its message may quote what was sent

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


async def _send_and_read(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    """Send all, then read as many replies.

    A SET that Redis refuses is a reply too, since Redis may be full and yet answer look-ups. Any other command that it
    refuses, or answers in another form than was asked for, has failed.
    """
    await connection.connect()  # type: ignore[no-untyped-call]
    await connection.send_packed_command(connection.pack_commands(commands))
    replies: list[Any] = []
    for name, *arguments in commands:
        try:
            reply = await connection.read_response()
        except ResponseError as refusal:
            if name != b"SET":
                raise
            reply = refusal
        if name == b"MGET" and not (isinstance(reply, list) and len(reply) == len(arguments)):
            raise InvalidResponse("MGET: expected one value for each key")
        replies.append(reply)
    return replies


class _Deadline:
    """`asyncio.timeout`, but Redis is not charged for the event loop's own stalls.

    A loop that was held up finds the reply and the deadline due in the same turn, and plain `timeout` lets the deadline
    win. Here a deadline that fires late is put off once more, by as much as it was late.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._due)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def extend(self, seconds: float) -> None:
        """Allow this much more time."""
        when = self._timer.when() + seconds
        self._timer.cancel()
        self._timer = self._loop.call_at(when, self._due)

    def _due(self) -> None:
        now = self._loop.time()
        self._timeout.reschedule(now + min(now - self._timer.when(), self._seconds))
