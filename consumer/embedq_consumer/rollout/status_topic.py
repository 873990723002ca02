"""The status topic: what all replicas say, in the one order that all of them read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
import structlog

from embedq_shared.codec import read_status
from embedq_shared.kafka import (
    BoundedConsumer,
    MakeConsumer,
    Polled,
    TopicPartition,
    UnreadableRecord,
    WholePartition,
)
from embedq_shared.messages import Status
from embedq_shared.topics import Topics

log = structlog.get_logger()

_POLL_MS: Final = 250
"""A replica that waits for its turn looks at the clock this often."""
_UNDECODABLE: Final = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)


class Said(msgspec.Struct, frozen=True):
    """One record: its key, and the status; None for a tombstone."""

    key: str
    status: Status | None


class StatusTopic:
    """Reads the statuses of all replicas. No group: every replica sees every record.

    Invariants:
        - Records come in the topic's order, each once.
        - What cannot be read, or is no status, is passed: other programs may write here too.
    """

    def __init__(
        self,
        options: dict[str, Any],
        topics: Topics,
        make_consumer: MakeConsumer = BoundedConsumer,
    ) -> None:
        self._topic = WholePartition(
            TopicPartition(topics.status, 0), options, poll_ms=_POLL_MS, make_consumer=make_consumer
        )

    async def open(self) -> list[Said]:
        """Connect and read to the end as it is now; all that was said. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
            TimeoutError: reading the topic took more than 60 s.
        """
        return _said(await self._topic.open())

    async def next(self) -> list[Said]:
        """What was said since the last call, in order; waits for it a quarter of a second at most."""
        return _said(await self._topic.next())

    async def close(self) -> None:
        """Disconnect."""
        if problem := await self._topic.close():
            log.warning("status_left_open", reason=problem)


def _said(records: Iterable[Polled]) -> list[Said]:
    return [said for record in records if (said := _said_by(record)) is not None]


def _said_by(record: Polled) -> Said | None:
    if isinstance(record, UnreadableRecord) or record.key is None:
        return None
    key = record.key.decode(errors="replace")
    if record.value is None:
        return Said(key, None)
    try:
        return Said(key, read_status(record.key, record.value))
    except _UNDECODABLE:
        return None
