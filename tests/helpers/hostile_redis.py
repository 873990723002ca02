"""A server that speaks Redis's protocol as the test says: what no real Redis can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Answer = Callable[[int], bytes]
"""What to send for a command, by how many keys its MGET asks for; 0 for any other command."""


class HostileRedis:
    """Answers PING and SET as Redis does, and MGET with `answer`; then, if `hangs_up`, closes the connection."""

    def __init__(self) -> None:
        self.answer: Answer = lambda keys: b"*%d\r\n" % keys + b"$-1\r\n" * keys
        self.hangs_up = False
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                name, *arguments = await _command(reader)
                if name == b"MGET":
                    writer.write(self.answer(len(arguments)))
                    if self.hangs_up:
                        break
                else:
                    writer.write(b"+PONG\r\n" if name == b"PING" else b"+OK\r\n")
                await writer.drain()
        writer.close()


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
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield one
    finally:
        server.close()
