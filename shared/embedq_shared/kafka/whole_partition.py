"""A small partition that is read whole and then followed, as that of a compacted topic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from aiokafka import TopicPartition

from embedq_shared.kafka.clients import AIOKafkaConsumer
from embedq_shared.kafka.connecting import start_client
from embedq_shared.kafka.reading.consumer import BoundedConsumer
from embedq_shared.kafka.reading.unreadable import Polled, poll_partition
from embedq_shared.kafka.stopping import stop_client

_READ_S: Final = 60.0
_CLOSE_S: Final = 5.0

MakeConsumer = Callable[..., AIOKafkaConsumer]


class WholePartition:
    """Reads from the beginning to the end as it is, and on from there. No group: every reader sees every record.

    Records come in the partition's order, each once; what cannot be read stands among them.
    """

    def __init__(
        self,
        partition: TopicPartition,
        options: Mapping[str, Any],
        *,
        poll_ms: int,
        fetch_ms: int = 100,
        make_consumer: MakeConsumer = BoundedConsumer,
    ) -> None:
        """`poll_ms`: how long `next` waits for a record at most. `fetch_ms`: how often the broker answers while there is none."""
        self._partition = partition
        self._poll_ms = poll_ms
        self._connected = False
        self._consumer = make_consumer(
            **options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=fetch_ms,
        )

    async def open(self) -> list[Polled]:
        """Connect and read to the end as it is now. After an error it may be called again.

        Raises:
            KafkaError: no broker answers.
            TimeoutError: reading took more than 60 s.
        """
        if not self._connected:
            await start_client(self._consumer)
            self._connected = True
        self._consumer.assign([self._partition])
        found: list[Polled] = []
        async with asyncio.timeout(_READ_S):
            await self._consumer.seek_to_beginning(self._partition)
            end = (await self._consumer.end_offsets([self._partition]))[self._partition]
            # The position, not the last record's offset: after the last record there may be compacted holes and
            # transaction markers.
            while await self._consumer.position(self._partition) < end:
                found += await self.next()
        return found

    async def next(self) -> list[Polled]:
        """The records since the last call; waits a moment for one."""
        return list(await poll_partition(self._consumer, self._partition, timeout_ms=self._poll_ms))

    async def close(self, within_s: float = _CLOSE_S) -> str | None:
        """Disconnect; None, or why that took too long."""
        return await stop_client(self._consumer, within_s)
