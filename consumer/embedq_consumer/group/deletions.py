"""Jobs that Kafka deleted before anybody read them: by age or by size, whatever the group has committed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Final

import structlog

from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import KafkaError, TopicPartition

log = structlog.get_logger()

Beginnings = Callable[[Collection[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]
"""Asks where partitions begin; raises KafkaError."""

_EVERY_S: Final = 10.0
"""Transactional producers leave a gap for each transaction, and asking where a partition begins tells these apart."""
_ASK_S: Final = 5.0


class DeletionWatch:
    """Looks at the offsets that were stepped over: those below where their partition begins now are records that nobody
    read, and nobody will. They are logged and counted, since their senders wait for answers that will not come.

    Gaps that a transaction's markers or compaction left lie above a partition's beginning, and mean nothing. The number is the most that it
    may have been: such gaps are among what was deleted, too.
    """

    def __init__(
        self, ledger: OffsetLedger, beginnings: Beginnings, metrics: Metrics, topics: Iterable[str]
    ) -> None:
        self._ledger = ledger
        self._beginnings = beginnings
        self._metrics = metrics
        for topic in topics:
            metrics.deleted_unread.labels(topic)  # begins at 0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        """Look now. Where the brokers do not say, it is asked again next time."""
        skipped = self._ledger.take_skipped()
        if not skipped:
            return
        try:
            async with asyncio.timeout(_ASK_S):
                beginnings = await self._beginnings(skipped)
        except (KafkaError, TimeoutError) as error:
            self._ledger.skip(skipped)
            log.warning("beginnings_unknown", reason=type(error).__name__)
            return
        for partition, offsets in skipped.items():
            deleted = min(offsets.stop, beginnings[partition]) - offsets.start
            if deleted > 0:
                self._tell(partition, offsets.start, deleted)

    def _tell(self, partition: TopicPartition, first: int, deleted: int) -> None:
        self._metrics.deleted_unread.labels(partition.topic).inc(deleted)
        log.error(
            "records_deleted_unread",
            topic=partition.topic,
            partition=partition.partition,
            first_offset=first,
            records=deleted,
            hint="Kafka deletes by retention.ms and retention.bytes, read or not",
        )
