"""A record to publish."""

from __future__ import annotations

import msgspec

from embedq_shared.headers import Header

Place = tuple[str, int | None]
"""A topic, and one partition of it or None for any."""


class Outgoing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One record to publish."""

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    timestamp_ms: int | None = None

    @property
    def place(self) -> Place:
        """Where it goes."""
        return self.topic, self.partition
