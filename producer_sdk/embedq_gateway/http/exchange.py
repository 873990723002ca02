"""One request, and what becomes of its answer."""

from __future__ import annotations

import os
import re
import time
from typing import Any, Final

from starlette.types import Message, Receive, Scope, Send

from embedq_gateway.errors import ApiError
from embedq_gateway.keys import Caller, Door
from embedq_gateway.keys import Scope as Right
from embedq_shared.topics import LANES, Lane

REQUEST_ID: Final = "x-request-id"
TIMEOUT: Final = "x-request-timeout"
LANE: Final = "x-embedq-lane"
MODEL_VERSION: Final = "x-embedq-model-version"

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
"""What others' ids look like. Anything else would only be a way to write into logs."""
_SECONDS: Final = re.compile(rb"\d{1,9}(\.\d{1,9})?")
_TRACE: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,256})?")
"""A W3C traceparent; one of a later version may go on. One that is wrong is none, as the standard has it."""


class HeldBytes:
    """Bytes of bodies that requests hold until they are answered, all together, and the most that they may."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    def take(self, size: int) -> bool:
        """Whether there was room for these; then they are held."""
        if self.held + size > self._most:
            return False
        self.held += size
        return True

    def give(self, size: int) -> None:
        """These are held no longer."""
        self.held -= size


class Exchange:
    """One request and its answer: made by `Entrance`, passed to the handler of its path, and shown to whoever counts and logs.

    `send` remembers status and size of the answer, and gives it the headers that every answer has.
    """

    __slots__ = (
        "_held",
        "_held_bytes",
        "_receive",
        "_send",
        "answered_at",
        "began",
        "caller",
        "closing",
        "error",
        "headers",
        "keys",
        "own_headers",
        "received_bytes",
        "request_id",
        "route",
        "scope",
        "sent_bytes",
        "status",
        "texts",
        "tokens",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        keys: Door,
        held: HeldBytes,
        *,
        closing: bool = False,
    ) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.keys = keys
        self._held = held
        self._held_bytes = 0
        self.closing = closing
        """Whether the connection ends with this answer, since the gateway is leaving."""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        """By name in lower case; of a header that occurs twice the last one."""
        given = self.headers.get(b"x-request-id")
        known = given is not None and _REQUEST_ID.fullmatch(given) is not None
        self.request_id: bytes = given if known and given is not None else os.urandom(16).hex().encode()
        self.began = time.monotonic()
        self.answered_at: float | None = None
        """Monotonic seconds when the last byte was handed on."""
        self.caller: Caller | None = None
        """Who asks; None where that was not asked for."""
        self.route = ""
        """The path as the routes have it, with names for its variable parts; "" where there is none."""
        self.status = 0
        """Of the answer; 0 before it."""
        self.error: str | None = None
        """The code of the error that was answered."""
        self.own_headers: list[tuple[bytes, bytes]] = []
        """Headers that its answer gets besides those that the handler gives it."""
        self.texts = 0
        self.tokens = 0
        self.received_bytes = 0
        self.sent_bytes = 0

    @property
    def method(self) -> str:
        """GET, POST, …"""
        return str(self.scope["method"])

    @property
    def path_params(self) -> dict[str, str]:
        """The variable parts of the path."""
        found: dict[str, str] = self.scope["path_params"]
        return found

    def require(self, scope: Right) -> Caller:
        """Who asks, if they may do this. Whoever was let in stays so until the answer, even if their key is removed meanwhile.

        Raises:
            ApiError: nobody who is known, or who may not.
        """
        self.caller = caller = self.caller or self.keys.caller(self.headers)
        caller.require(scope)
        return caller

    # -- what headers say ---------------------------------------------------------------------------------------------

    def timeout(self, default: float, most: float) -> float:
        """Seconds that the request has.

        Raises:
            ApiError: its header is no number of seconds above 0.
        """
        raw = self.headers.get(b"x-request-timeout")
        if raw is None:
            return default
        seconds = float(raw) if _SECONDS.fullmatch(raw) else 0.0
        if seconds <= 0:
            raise ApiError("invalid_header", f"`{TIMEOUT}`: expected seconds above 0, such as 2.5", TIMEOUT)
        return min(seconds, most)

    def lane(self) -> Lane | None:
        """The lane that the request asks for; None: it does not say.

        Raises:
            ApiError: its header names no lane.
        """
        raw = self.headers.get(b"x-embedq-lane")
        if raw is None:
            return None
        for lane in LANES:
            if raw == lane.encode():
                return lane
        raise ApiError("invalid_header", f"`{LANE}`: expected one of {', '.join(LANES)}", LANE)

    def trace(self) -> str | None:
        """Its W3C traceparent."""
        raw = self.headers.get(b"traceparent")
        return None if raw is None or _TRACE.fullmatch(raw) is None else raw.decode("ascii")

    def hold(self, size: int) -> None:
        """Make room for bytes of its body, which it holds until it is answered.

        Raises:
            ApiError: requests hold too many.
        """
        if not self._held.take(size):
            raise ApiError(
                "overloaded", "the requests under way are too large to hold another one; try again"
            )
        self._held_bytes += size

    def ended(self) -> None:
        """It holds nothing any more."""
        self._held.give(self._held_bytes)
        self._held_bytes = 0

    # -- what goes in and out -----------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next part of the body, or that the client has gone."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.received_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Any) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id), *self.own_headers]
            if self.closing:
                own.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        else:
            self.sent_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.answered_at = time.monotonic()
        await self._send(message)
