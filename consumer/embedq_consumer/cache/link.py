"""What the cache asks of its connection to Redis, so that a test can stand in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Command = tuple[bytes, ...]
"""The name of a Redis command and its arguments."""


class LinkFailed(Exception):
    """A round trip did not run to its end. The message is the kind of failure alone: never what was sent."""


class Link(Protocol):
    """Round trips to one Redis. Several may be under way at once."""

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send all commands in one write; one reply for each, in order.

        A list of as many values as keys, bytes or None, for MGET; what Redis says, or its refusal, for SET. A round
        trip that must first connect may take longer than `timeout_s`.

        Raises:
            LinkFailed: no connection, no reply in time, or not the reply of a Redis.
        """

    async def close(self, timeout_s: float) -> None:
        """Close every connection, each within `timeout_s`. Never raises."""
