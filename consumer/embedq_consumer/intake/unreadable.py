"""Steps over records that the client cannot hand out, and loses none of those around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

from embedq_consumer.group import OffsetLedger
from embedq_consumer.intake.jobs_consumer import JobsConsumer
from embedq_shared.kafka import UNREADABLE, ConsumerRecord, TopicPartition, step_over

_FIRST_WAIT_MS: Final = 200
_PATIENCE_MS: Final = 5000
"""Longest wait for a single record after a failed poll."""
_CAREFUL_RECORDS: Final = 2000
"""Records of a partition that are read one by one after a failed poll, before polls are whole again."""

PolledRecords = Mapping[TopicPartition, Sequence[ConsumerRecord]]


class Poll(Protocol):
    """One poll; empty if it was interrupted."""

    async def __call__(
        self, partitions: Sequence[TopicPartition], *, limit: int, timeout_ms: int
    ) -> PolledRecords:
        """At most `limit` records."""


class CarefulReader:
    """Reads record by record after a failed poll, until the client meets the record that it cannot hand out.

    The Kafka room's own walk (`embedq_shared.kafka.poll_partition`) would not do: it knows neither the ledger, to which a
    failed poll's other partitions must be set back, nor interruptions.

    Invariants:
        - A failed poll costs no record: it may have swallowed those of other partitions while their positions moved, so
          every partition is first set back to where the ledger is.
        - The offset that is stepped over is the client's position, since with one record a poll what raises stands there.
        - Where nothing was found, the next wait is twice as long: the broker may be too slow for so short a one.
    """

    def __init__(
        self, consumer: JobsConsumer, ledger: OffsetLedger, poll: Poll, beat: Callable[[], None]
    ) -> None:
        self._consumer = consumer
        self._ledger = ledger
        self._poll = poll
        self._beat = beat
        self._patience_ms = _FIRST_WAIT_MS

    async def read(
        self,
        partitions: Collection[TopicPartition],
        hand_over: Callable[[PolledRecords], bool],
        stepped_over: Callable[[TopicPartition, int, Exception], None],
    ) -> None:
        """Read these partitions until each has no record ready, or one that was stepped over.

        `hand_over` begins the records and says whether their partition may give more; `stepped_over` gets the place of a
        record that cannot be read, and why.
        """
        for partition in sorted(partitions):
            await self._rewind(partition)
        found = [await self._read(partition, hand_over, stepped_over) for partition in sorted(partitions)]
        self._patience_ms = _FIRST_WAIT_MS if any(found) else min(2 * self._patience_ms, _PATIENCE_MS)

    async def _read(
        self,
        partition: TopicPartition,
        hand_over: Callable[[PolledRecords], bool],
        stepped_over: Callable[[TopicPartition, int, Exception], None],
    ) -> bool:
        """One partition. True if a record was stepped over; if one is left, the next whole poll fails again."""
        for _ in range(_CAREFUL_RECORDS):
            self._beat()
            try:
                found = await self._poll([partition], limit=1, timeout_ms=self._patience_ms)
            except UNREADABLE as error:
                offset = await step_over(self._consumer, partition)
                if offset is not None:
                    stepped_over(partition, offset, error)
                return offset is not None
            if not found or not hand_over(found):
                return False
        return False

    async def _rewind(self, partition: TopicPartition) -> None:
        position = self._ledger.position(partition)
        if position is None:
            await self._consumer.seek_to_beginning(partition)
        else:
            self._consumer.seek(partition, position)
