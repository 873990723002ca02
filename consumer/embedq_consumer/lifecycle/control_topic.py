"""The control topic: the desired model of this replica's alias, read to its end before the replica joins the group."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from embedq_consumer.ending import ended
from embedq_consumer.intake.unreadable import UNREADABLE
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import decode_control
from embedq_shared.messages import Control
from embedq_shared.topics import Topics

log = structlog.get_logger()

_POLL_MS: Final = 1000
_READ_S: Final = 60.0
_CLOSE_S: Final = 5.0
_UNREADABLE: Final = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)


class ControlTopic:
    """Reads control records of one alias. No group: every replica sees every record."""

    def __init__(self, options: dict[str, Any], topics: Topics, alias: str, metrics: Metrics) -> None:
        self._alias = alias
        self._metrics = metrics
        self._partition = TopicPartition(topics.control, 0)
        self._consumer = AIOKafkaConsumer(
            **options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
        )

    async def open(self) -> Control | None:
        """Connect and read to the end as it is now; the newest record of the alias.

        Raises:
            TimeoutError: the broker did not hand out the topic in time.
        """
        await self._consumer.start()
        self._consumer.assign([self._partition])
        newest: Control | None = None
        async with asyncio.timeout(_READ_S):
            await self._consumer.seek_to_beginning(self._partition)
            end = (await self._consumer.end_offsets([self._partition]))[self._partition]
            # The position, not the last record's offset: compaction leaves holes, and markers are no records.
            while await self._consumer.position(self._partition) < end:
                newest = _newest(newest, await self._poll())
        return newest

    async def next(self) -> list[Control]:
        """The alias's records since the last call, in order; waits for one."""
        while True:
            if found := await self._poll():
                return found

    async def close(self) -> None:
        """Disconnect."""
        if problem := await ended(self._consumer.stop(), _CLOSE_S):
            log.warning("control_left_open", reason=problem)

    async def _poll(self) -> list[Control]:
        found = []
        for record in await self._records():
            if record.key != self._alias.encode():
                continue
            try:
                command = decode_control(record.value or b"")
                if command.alias != self._alias:
                    raise msgspec.ValidationError("the record's key and its alias differ")
            except _UNREADABLE as error:
                self._metrics.reloads.labels("ignored").inc()
                log.warning("control_record_ignored", offset=record.offset, reason=type(error).__name__)
                continue
            found.append(command)
        return found

    async def _records(self) -> list[ConsumerRecord]:
        try:
            polled = await self._consumer.getmany(self._partition, timeout_ms=_POLL_MS)
        except UNREADABLE as error:
            return await self._read_carefully(error)
        records: list[ConsumerRecord] = polled.get(self._partition, [])
        return records

    async def _read_carefully(self, error: Exception) -> list[ConsumerRecord]:
        """The records in front of the one that the client cannot hand out, which is stepped over.

        The failed poll withheld them, and its position has not moved.
        """
        self._consumer.seek(self._partition, await self._consumer.position(self._partition))
        found: list[ConsumerRecord] = []
        while True:
            try:
                polled = await self._consumer.getmany(self._partition, timeout_ms=_POLL_MS, max_records=1)
            except UNREADABLE:
                offset = await self._consumer.position(self._partition)
                self._consumer.seek(self._partition, offset + 1)
                self._metrics.reloads.labels("ignored").inc()
                log.warning("control_record_ignored", offset=offset, reason=type(error).__name__)
                return found
            if not polled:
                return found
            found += polled[self._partition]


def _newest(newest: Control | None, found: list[Control]) -> Control | None:
    """The highest version wins; of two equal ones, the first, as with replicas that read it live."""
    for command in found:
        if newest is None or command.version > newest.version:
            newest = command
    return newest
