"""The access log: a line of JSON for each request that has ended. Never its texts, its vectors or its key."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, BinaryIO, Final

import msgspec

from embedq_gateway.http.exchange import Exchange

_FLUSH_S: Final = 0.1
"""Lines wait this long for others: a system call for each would be a tenth of a request's work."""
_MOST_BYTES: Final = 4096
"""Of one write: a pipe keeps so much together, where several processes share one."""

_encode: Final = msgspec.json.Encoder().encode


class AccessLog:
    """An observer of requests. Owns the lines that are not written yet."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._stream = stream or sys.stdout.buffer
        self._lines: list[bytes] = []
        self._second = 0
        self._stamp = ""

    def __call__(self, exchange: Exchange) -> None:
        """Take the line of a request."""
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._lines.append(_encode(self._event(exchange)))

    def flush(self) -> None:
        """Write what waits."""
        lines, self._lines = self._lines, []
        chunk: list[bytes] = []
        size = 0
        for line in lines:
            if size + len(line) >= _MOST_BYTES and chunk:
                self._write(chunk)
                chunk, size = [], 0
            chunk.append(line)
            size += len(line) + 1
        if chunk:
            self._write(chunk)

    def _write(self, lines: list[bytes]) -> None:
        self._stream.write(b"\n".join([*lines, b""]))
        self._stream.flush()

    def _event(self, exchange: Exchange) -> dict[str, Any]:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        client = exchange.scope.get("client")
        return {
            "timestamp": f"{self._stamp}.{int(now % 1 * 1000):03}Z",
            "level": "info",
            "event": "request",
            "method": exchange.method,
            "route": exchange.route or None,
            "status": exchange.status,
            "error": exchange.error,
            "ms": round((time.monotonic() - exchange.began) * 1000, 2),
            "request_id": exchange.request_id.decode("ascii"),
            "caller": None if exchange.caller is None else exchange.caller.name,
            "client": None if client is None else client[0],
            "texts": exchange.texts,
            "tokens": exchange.tokens,
            "received_bytes": exchange.received_bytes,
            "sent_bytes": exchange.sent_bytes,
        }
