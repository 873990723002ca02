"""The control topic: the desired model of this replica's alias, read to its end before the replica joins the group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import read_command
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
from embedq_shared.messages import Control
from embedq_shared.topics import Topics

log = structlog.get_logger()

_POLL_MS: Final = 1000
_READ_S: Final = 60.0
_CLOSE_S: Final = 5.0
_UNDECODABLE: Final = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)


class ControlTopic:
    """Reads the control records of one alias. No group: every replica sees every record.

    Invariants:
        - Records come in the topic's order, each once.
        - A record that cannot be read, or that is no command, is counted and logged, and passed.
    """

    def __init__(
        self,
        options: dict[str, Any],
        topics: Topics,
        alias: str,
        metrics: Metrics,
        make_consumer: Callable[..., AIOKafkaConsumer] = BoundedConsumer,
    ) -> None:
        self._alias = alias
        self._metrics = metrics
        self._partition = TopicPartition(topics.control, 0)
        self._connected = False
        self._consumer = make_consumer(
            **options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
        )

    async def open(self) -> Control | None:
        """Connect and read to the end as it is now; the newest command for the alias. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
            TimeoutError: reading the topic took more than 60 s.
        """
        if not self._connected:
            await start_client(self._consumer)
            self._connected = True
        self._consumer.assign([self._partition])
        newest: Control | None = None
        async with asyncio.timeout(_READ_S):
            await self._consumer.seek_to_beginning(self._partition)
            end = (await self._consumer.end_offsets([self._partition]))[self._partition]
            # The position, not the last record's offset: after the last record there may be compacted holes and
            # transaction markers.
            while await self._consumer.position(self._partition) < end:
                newest = _newest(newest, await self._poll())
        return newest

    async def next(self) -> list[Control]:
        """The alias's commands since the last call, in order; waits for one."""
        while True:
            if found := await self._poll():
                return found

    async def close(self) -> None:
        """Disconnect."""
        if problem := await stop_client(self._consumer, _CLOSE_S):
            log.warning("control_left_open", reason=problem)

    async def _poll(self) -> list[Control]:
        records = await poll_partition(self._consumer, self._partition, timeout_ms=_POLL_MS)
        return [command for record in records if (command := self._command(record)) is not None]

    def _command(self, record: Polled) -> Control | None:
        """The command in a record; None if it is for another alias, or is no command."""
        if isinstance(record, UnreadableRecord):
            self._ignore(record.offset, record.reason)
            return None
        try:
            return read_command(record.key, record.value, self._alias)
        except _UNDECODABLE as error:
            self._ignore(record.offset, type(error).__name__)
            return None

    def _ignore(self, offset: int, reason: str) -> None:
        self._metrics.reloads.labels("ignored").inc()
        log.warning("control_record_ignored", offset=offset, reason=reason)


def _newest(newest: Control | None, found: list[Control]) -> Control | None:
    """The command with the highest version; of two equal versions the first, which replicas that read live applied."""
    for command in found:
        if newest is None or command.version > newest.version:
            newest = command
    return newest
