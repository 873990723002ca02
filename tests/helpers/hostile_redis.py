"""A server that speaks Redis's protocol as the test says: what no real Redis can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

Answer = Callable[[int], bytes]
"""What to send for a command, by how many keys its MGET asks for; 0 for any other command."""

HOSTILE: Final[dict[str, Answer]] = {
    "integers": lambda keys: b"*%d\r\n" % keys + b":1\r\n" * keys,
    "nested": lambda keys: b"*%d\r\n" % keys + b"*1\r\n$1\r\nx\r\n" * keys,
    "deep": lambda keys: b"*1\r\n" * 200_000,
    "errors": lambda keys: b"*%d\r\n" % keys + b"-ERR no\r\n" * keys,
    "too few": lambda keys: b"*%d\r\n" % (keys - 1) + b"$-1\r\n" * (keys - 1),
    "too many": lambda keys: b"*%d\r\n" % (keys + 1) + b"$-1\r\n" * (keys + 1),
    "twice": lambda keys: 2 * (b"*%d\r\n" % keys + b"$-1\r\n" * keys),
    "none": lambda keys: b"*-1\r\n",
    "huge value": lambda keys: b"*%d\r\n$536870912\r\n" % keys + b"x" * 8_000_000,
    "huge list": lambda keys: b"*2147483647\r\n" + b"$-1\r\n" * 100_000,
    "endless line": lambda keys: b"+" + b"x" * 8_000_000,
    "push": lambda keys: b">2\r\n+invalidate\r\n*1\r\n$1\r\nx\r\n",
    "map": lambda keys: b"%1\r\n+a\r\n:1\r\n",
    "null": lambda keys: b"_\r\n",
    "streamed": lambda keys: b"$?\r\n;4\r\nabcd\r\n;0\r\n",
    "not a number": lambda keys: b"*two\r\n",
    "negative": lambda keys: b"*%d\r\n$-7\r\n" % keys,
    "no end": lambda keys: b"*%d\r\n" % keys + b"$1\r\nxyz" * keys,
    "moved": lambda keys: b"-MOVED 1\r\n",
    "asked": lambda keys: b"-ASK x y:z\r\n",
    "loading": lambda keys: b"-LOADING\r\n",
    "bytes": lambda keys: b"-\xff\xfe\r\n",
    "another protocol": lambda keys: b"HTTP/1.1 200 OK\r\n\r\n",
    "zeros": lambda keys: bytes(100),
}
"""Answers to MGET that are none."""


class HostileRedis:
    """Answers PING as Redis does, SET with `answer_to_set` and MGET with `answer`; then, if `hangs_up`, closes the connection."""

    def __init__(self) -> None:
        self.answer: Answer = lambda keys: b"*%d\r\n" % keys + b"$-1\r\n" * keys
        self.answer_to_set = b"+OK\r\n"
        self.hangs_up = False
        self.url = ""
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)

    async def close(self) -> None:
        """Hang up everywhere."""
        for writer in self._serving.values():
            writer.close()
        await asyncio.gather(*self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                name, *arguments = await _command(reader)
                if name == b"MGET":
                    writer.write(self.answer(len(arguments)))
                    if self.hangs_up:
                        break
                else:
                    writer.write(b"+PONG\r\n" if name == b"PING" else self.answer_to_set)
                await writer.drain()


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    parts = []
    for _ in range(count):
        length = int((await reader.readuntil(b"\r\n"))[1:])
        parts.append((await reader.readexactly(length + 2))[:-2])
    return parts


@asynccontextmanager
async def hostile_redis() -> AsyncIterator[HostileRedis]:
    """One on a free port."""
    one = HostileRedis()
    server = await asyncio.start_server(one.accept, "127.0.0.1", 0)
    one.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield one
    finally:
        server.close()
        await one.close()
