"""A client for HTTP/1.1 that costs little: what is measured shares the cores with whoever measures."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

HEAD_ENDS = b"\r\n\r\n"


def post(path: str, body: Any, *headers: str) -> bytes:
    """A request with a body of JSON, as it goes over the wire."""
    text = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(text)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + text


class _Wire(asyncio.Protocol):
    """One TCP connection: the answer that is awaited on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[int] | None = None
        self.parts: list[bytes] = []
        self._head = b""
        self._status = 0
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionResetError("the server hung up before its answer"))

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            self._head, end, data = (self._head + data).partition(HEAD_ENDS)
            if not end:
                return
            self._status, self._missing = _read(self._head)
            self._head = b""
            self.parts.clear()
        self.parts.append(data)
        self._missing -= len(data)
        if not self._missing and self.answer is not None:
            self.answer.set_result(self._status)


class Connection:
    """A client's connection, made at its first request and kept; one request is under way at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wire = _Wire()

    @property
    def body(self) -> bytes:
        """Of the last answer."""
        return b"".join(self._wire.parts)

    async def ask(self, data: bytes) -> int:
        """The status of the answer.

        Raises:
            ConnectionError: there is none.
        """
        loop = asyncio.get_running_loop()
        if self._wire.transport is None:
            self._wire = wire = _Wire()
            await loop.create_connection(lambda: wire, "127.0.0.1", self._port)
        answer: asyncio.Future[int] = loop.create_future()
        self._wire.answer = answer
        if self._wire.transport is None:
            raise ConnectionResetError("the server hung up at once")
        self._wire.transport.write(data)
        return await answer

    def give_up(self, data: bytes) -> None:
        """Ask where there is a connection, and go without waiting for the answer."""
        if self._wire.transport is not None:
            self._wire.transport.write(data)
            self.close()

    def close(self) -> None:
        """Hang up."""
        if self._wire.transport is not None:
            self._wire.transport.close()
            self._wire = _Wire()


def _read(head: bytes) -> tuple[int, int]:
    """Status and length of an answer, whose head must say its length."""
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head.split(maxsplit=2)[1]), int(length)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What became of some requests."""

    requests: int
    seconds: float
    """From the first request to the last answer."""
    milliseconds: list[float]
    """Of each request."""


async def load(port: int, requests: Sequence[bytes], *, at_once: int, for_seconds: float = math.inf) -> Load:
    """Send requests, `at_once` of them under way over as many connections. Nothing is sent after `for_seconds`; what was sent is
    waited for.

    Raises:
        RuntimeError: a request was answered with another status than 200.
    """
    connections = [Connection(port) for _ in range(at_once)]
    left = iter(requests)
    took: list[float] = []
    began = time.perf_counter()

    async def caller(connection: Connection) -> None:
        for request in left:
            sent = time.perf_counter()
            status = await connection.ask(request)
            now = time.perf_counter()
            took.append((now - sent) * 1000)
            if status != 200:
                raise RuntimeError(f"a request was answered with {status}: {connection.body[:500]!r}")
            if now - began > for_seconds:
                return

    try:
        async with asyncio.TaskGroup() as callers:
            for connection in connections:
                callers.create_task(caller(connection))
    finally:
        for connection in connections:
            connection.close()
    return Load(requests=len(took), seconds=time.perf_counter() - began, milliseconds=took)
