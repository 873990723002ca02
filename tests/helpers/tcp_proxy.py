"""A TCP proxy whose faults a test switches on and off: it stands before a broker or Redis.

It runs on a thread and an event loop of its own, so that a busy test neither delays it nor is delayed by it, and so that
tests with and without an event loop may use it. Every method may be called from any thread; a change is in force when
the call returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec

from embedq_sdk.dev.ports import HOST, free_ports

_CHUNK: Final = 64 * 1024
_CONNECT_S: Final = 5.0
_CALL_S: Final = 30.0
"""No call takes more than milliseconds, unless the proxy itself is broken."""
_DRIP_S: Final = 0.05
"""How often a slow drip lets bytes through."""
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing sends a reset instead of an orderly end."""

Returned = TypeVar("Returned")


class Way(Enum):
    """What becomes of bytes in one direction.

    PASS: they go on. HOLD: they wait, and go on once the fault is over, as after a network that lost packets for a while:
    a request that was sent long ago still arrives. DROP: they are read and swallowed; the stream is broken then, so its
    connection is reset once the fault is over.
    """

    PASS = "pass"
    HOLD = "hold"
    DROP = "drop"


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """What the proxy does to every connection. `up` is from the client to the server, `down` the way back.

    `refuse`: new connections are refused. `delay_s`: each chunk waits this long in each direction. `bytes_per_s`: all that
    goes through in one direction of one connection; None: as fast as it goes.
    """

    refuse: bool = False
    up: Way = Way.PASS
    down: Way = Way.PASS
    delay_s: float = 0.0
    bytes_per_s: int | None = None


NONE: Final = Faults()


class TcpProxy:
    """Forwards connections on `port` to one server, with the faults that are set at the moment.

    Invariants:
        - The port is the same for the proxy's whole life, while it refuses connections too.
        - A connection that lost bytes is reset when its fault ends; no stream has a hole that its reader cannot see.
    """

    def __init__(self, host: str, port: int, *, listen: int = 0) -> None:
        """`listen`: the port to listen on; 0: any free one below the ephemeral range, so that no client that tries a
        refused port again can be given that very port and connect to itself."""
        self._target = (host, port)
        self._faults = NONE
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._listener = _listener(listen or free_ports(1)[0])
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        """Connections so far."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where clients connect, host:port."""
        return f"{HOST}:{self.port}"

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    @property
    def faults(self) -> Faults:
        """What is in force."""
        return self._faults

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._call(self._listen)

    def close(self) -> None:
        """End every connection and the thread. Closing twice does nothing."""
        if not self._thread.is_alive():
            return
        self._call(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    def point_to(self, host: str, port: int) -> None:
        """Connections from now on go to this server."""
        self._target = (host, port)

    # -- faults -------------------------------------------------------------------------------------------------------

    def set(self, faults: Faults) -> None:
        """From now on these, on open and new connections."""

        async def change() -> None:
            before, self._faults = self._faults, faults
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            for connection in list(self._connections):
                if connection.lost and Way.DROP not in (faults.up, faults.down):
                    connection.reset()
            if faults.refuse and not before.refuse:
                await self._stop_listening()
            elif before.refuse and not faults.refuse:
                self._listener = _listener(self.port)
                await self._listen()

        self._call(change)

    def heal(self) -> None:
        """No faults: what was held goes on, what lost bytes is reset."""
        self.set(NONE)

    def reset(self) -> None:
        """Reset every open connection, once. New ones are accepted, unless they are refused."""

        async def reset_all() -> None:
            for connection in list(self._connections):
                connection.reset()

        self._call(reset_all)

    def cut(self) -> None:
        """The server is gone: open connections are reset, new ones refused."""
        self.set(Faults(refuse=True))
        self.reset()

    def refuse(self) -> None:
        """New connections are refused; open ones go on."""
        self.set(Faults(refuse=True))

    def delay(self, seconds: float) -> None:
        """Every chunk is late by this much in each direction."""
        self.set(Faults(delay_s=seconds))

    def drip(self, bytes_per_s: int) -> None:
        """Bytes come one by one."""
        self.set(Faults(bytes_per_s=bytes_per_s))

    def half_open(self) -> None:
        """Connections are accepted and all their bytes swallowed: nobody answers, and nobody says so."""
        self.set(Faults(up=Way.DROP, down=Way.DROP))

    def hold_requests(self) -> None:
        """Nothing arrives at the server until `heal`; then all of it does, late."""
        self.set(Faults(up=Way.HOLD))

    def hold_answers(self) -> None:
        """Everything arrives at the server, and no answer comes back until `heal`."""
        self.set(Faults(down=Way.HOLD))

    # -- connections --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._listener)

    async def _stop_listening(self) -> None:
        """Not `wait_closed`, which waits for the open connections as well."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._listener.close()

    async def _shut(self) -> None:
        await self._stop_listening()
        for connection in list(self._connections):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            server = await self._connect()
            if server is None:
                return
            connection.writers.append(server[1])
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(connection, reader, server[1], lambda: self._faults.up))
                pumps.create_task(self._pump(connection, server[0], writer, lambda: self._faults.down))
        except (OSError, asyncio.CancelledError):
            pass
        except BaseExceptionGroup as group:
            if group.split((OSError, asyncio.CancelledError))[1] is not None:
                raise
        finally:
            connection.reset()
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The server's side of a new connection; None if it takes none: the client's side is reset then."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await asyncio.open_connection(*self._target)
        except (OSError, TimeoutError):
            return None

    async def _pump(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Callable[[], Way],
    ) -> None:
        """One direction, until its end; a reset of either side ends both."""
        while data := await reader.read(_CHUNK):
            while data:
                faults, changed = self._faults, self._changed
                if way() is Way.HOLD:
                    await changed.wait()
                    continue
                if way() is Way.DROP:
                    connection.lost = True
                    break
                if faults.delay_s:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(faults.delay_s):
                            await changed.wait()
                            continue
                piece = data
                if faults.bytes_per_s is not None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_DRIP_S):
                            await changed.wait()
                            continue
                    piece = data[: max(1, int(faults.bytes_per_s * _DRIP_S))]
                writer.write(piece)
                await writer.drain()
                data = data[len(piece) :]
        if way() is Way.PASS and writer.can_write_eof():
            writer.write_eof()

    def _call(self, work: Callable[[], Any]) -> None:
        """Run a coroutine function on the proxy's own loop, and wait for it."""
        asyncio.run_coroutine_threadsafe(work(), self._loop).result(_CALL_S)


class _Connection:
    """The two sides of one connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.lost = False

    def reset(self) -> None:
        """End it at once, as a machine does that forgot it."""
        for writer in self.writers:
            with suppress(OSError):
                connected: socket.socket | None = writer.get_extra_info("socket")
                if connected is not None:
                    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen(128)
    listener.setblocking(False)
    return listener
