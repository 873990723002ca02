"""A record to publish."""

from __future__ import annotations

import msgspec

from embedq_shared.headers import Header

Place = tuple[str, int]
"""A topic and one partition of it: where records go, and what fails or works by itself."""


class Outgoing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One record to publish.

    `partition` is None where the key decides. `anywhere`: while that partition is out of order, another one will do.
    `by_key`: no other one will, since a later record of the key must replace this one. `express`: somebody waits for it, so
    it goes before what waits for its place and is not.
    """

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    timestamp_ms: int | None = None
    anywhere: bool = False
    by_key: bool = False
    express: bool = False

    @property
    def movable(self) -> bool:
        """Whether another partition of the topic will do."""
        return not self.by_key and (self.anywhere or self.partition is None)

    @property
    def size(self) -> int:
        """Bytes that it takes in a batch, about."""
        return len(self.value or b"") + len(self.key or b"") + _REST_BYTES


_REST_BYTES = 512
"""Of a record in a batch: headers, which are not counted one by one, lengths, offset, timestamp."""
