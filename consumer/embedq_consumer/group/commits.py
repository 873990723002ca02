"""The group's commits, for the one who says what they carry besides offsets (the `Custodian`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from embedq_consumer.group.member import OffsetStore
from embedq_consumer.group.offset_committer import OffsetCommitter
from embedq_consumer.group.offsets import OffsetLedger
from embedq_consumer.group.topic_watch import start_of
from embedq_shared.kafka import TopicPartition

Ends = Callable[[Collection[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]
"""Asks where partitions end; raises KafkaError."""


class GroupCommits:
    """Reads and writes commits of single partitions."""

    def __init__(
        self, store: OffsetStore, ledger: OffsetLedger, committer: OffsetCommitter, ends: Ends
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._committer = committer
        self._ends = ends

    def is_current(self, partition: TopicPartition, epoch: int) -> bool:
        """Whether the partition is still ours as it was in that epoch."""
        return self._ledger.epoch(partition) == epoch

    async def write(self, partitions: Collection[TopicPartition]) -> bool:
        """Commit these now, whether their offsets rose or not. False if the broker did not take it."""
        return await self._committer.commit(partitions)

    async def read(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int | None, str]]:
        """The stored offset of each partition and the text that came with it; neither where that is of another topic of the
        same name.

        Raises:
            KafkaError: what the brokers say.
        """
        found = await self._store.committed(partitions)
        return {
            partition: (None, "")
            if (stored := found.get(partition)) is None
            or start_of(stored, self._ledger.topic_id(partition)).is_new
            else (stored.offset, stored.metadata)
            for partition in partitions
        }

    async def ends(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where these partitions end.

        Raises:
            KafkaError: what the brokers say.
        """
        return await self._ends(partitions)
