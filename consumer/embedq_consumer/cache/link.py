"""What the cache asks of its connection to Redis, so that a test can stand in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

Command = tuple[bytes, ...]
"""The name of a Redis command and its arguments."""

Reason = Literal["timeout", "connection", "tls", "password", "permission", "protocol", "refused"]
"""Why a round trip failed, as far as it matters to whoever mends it: no answer in time; no connection; no certificate
that both sides accept; a wrong user or password; a right that the user lacks; an answer that is not Redis's to what was
asked; and any other refusal, such as that of a Redis that still loads."""


class LinkFailed(Exception):
    """A round trip did not run to its end. The message is the kind of failure alone: never what was sent."""

    def __init__(self, kind: str, reason: Reason = "connection") -> None:
        super().__init__(kind)
        self.reason: Reason = reason


class Refusal(msgspec.Struct, frozen=True):
    """A SET that Redis refused, by the first word of what it said, such as OOM or READONLY."""

    code: str


class Link(Protocol):
    """Round trips to one Redis. Several may be under way at once."""

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send all commands in one write; one reply for each, in order.

        A list of as many values as keys, bytes or None, for MGET; what Redis says, or a `Refusal`, for SET. A round
        trip that must first connect may take longer than `timeout_s`.

        Raises:
            LinkFailed: no connection, no reply in time, or not the reply of a Redis.
        """

    async def close(self, timeout_s: float) -> None:
        """Close every connection, each within `timeout_s`. Never raises."""
