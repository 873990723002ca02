"""The status topic: what all replicas say, in the one order that all of them read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from embedq_shared.codec import read_status
from embedq_shared.kafka import (
    AIOKafkaConsumer,
    BoundedConsumer,
    Polled,
    TopicPartition,
    UnreadableRecord,
    poll_partition,
    start_client,
    stop_client,
)
from embedq_shared.messages import Status
from embedq_shared.topics import Topics

log = structlog.get_logger()

_POLL_MS: Final = 250
"""A replica that waits for its turn looks at the clock this often."""
_READ_S: Final = 60.0
_CLOSE_S: Final = 5.0
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
        make_consumer: Callable[..., AIOKafkaConsumer] = BoundedConsumer,
    ) -> None:
        self._partition = TopicPartition(topics.status, 0)
        self._connected = False
        self._consumer = make_consumer(
            **options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
        )

    async def open(self) -> list[Said]:
        """Connect and read to the end as it is now; all that was said. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
            TimeoutError: reading the topic took more than 60 s.
        """
        if not self._connected:
            await start_client(self._consumer)
            self._connected = True
        self._consumer.assign([self._partition])
        found: list[Said] = []
        async with asyncio.timeout(_READ_S):
            await self._consumer.seek_to_beginning(self._partition)
            end = (await self._consumer.end_offsets([self._partition]))[self._partition]
            # The position, not the last record's offset: compaction may have removed the last records.
            while await self._consumer.position(self._partition) < end:
                found += await self.next()
        return found

    async def next(self) -> list[Said]:
        """What was said since the last call, in order; waits for it a quarter of a second at most."""
        records = await poll_partition(self._consumer, self._partition, timeout_ms=_POLL_MS)
        return [said for record in records if (said := _said(record)) is not None]

    async def close(self) -> None:
        """Disconnect."""
        if problem := await stop_client(self._consumer, _CLOSE_S):
            log.warning("status_left_open", reason=problem)


def _said(record: Polled) -> Said | None:
    if isinstance(record, UnreadableRecord) or record.key is None:
        return None
    key = record.key.decode(errors="replace")
    if record.value is None:
        return Said(key, None)
    try:
        return Said(key, read_status(record.key, record.value))
    except _UNDECODABLE:
        return None
