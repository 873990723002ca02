"""Answers in JSON, as ASGI applications: what a handler returns."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

_JSON: Final = (b"content-type", b"application/json")
_encoder: Final = msgspec.json.Encoder()

Header = tuple[bytes, bytes]


class JsonAnswer:
    """A whole body that is there at once. Starlette's own response makes three lists more for each."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, body: bytes, *, status: int = 200, headers: list[Header] | None = None) -> None:
        self.body = body
        self.status = status
        self.headers = headers or []

    @classmethod
    def of(cls, value: Any, *, status: int = 200, headers: list[Header] | None = None) -> JsonAnswer:
        """Of anything that msgspec writes; `bytes` become base64."""
        return cls(_encoder.encode(value), status=status, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; to HEAD without the body."""
        headers = [_JSON, (b"content-length", b"%d" % len(self.body)), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body})
