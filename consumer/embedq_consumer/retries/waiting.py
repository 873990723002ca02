"""Records of retry topics that were read before they are due. Pure: time is an argument, one owner (the consumer)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from embedq_consumer.retries.past import due_ms_of
from embedq_consumer.retries.tiers import RetryTiers
from embedq_shared.kafka import ConsumerRecord, TopicPartition


class WaitingRecords:
    """Keeps what came early, in the order of its partition, and hands it out when it is due.

    Times: `now` is monotonic seconds, `now_ms` epoch milliseconds, since a record's due time comes from another process.

    Invariants:
        - A partition's records are handed out in the order of their offsets, each once.
        - None waits longer than its tier's delay after it was read, whatever it says of itself; one that does not say when
          it is due, or cannot be read, does not wait.
        - Of a partition of which something waits, nothing more is to be read: so there is one poll's worth at most.
    """

    def __init__(self, tiers: RetryTiers) -> None:
        self._tiers = tiers
        self._waiting: dict[TopicPartition, deque[tuple[float, ConsumerRecord]]] = {}

    def put(
        self, polled: Mapping[TopicPartition, Sequence[ConsumerRecord]], now: float, now_ms: float
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        """Records of a poll. Those of retry topics are kept; the others come back."""
        others: dict[TopicPartition, list[ConsumerRecord]] = {}
        for partition, records in polled.items():
            delay_s = self._tiers.delay_s(partition.topic)
            if delay_s is None:
                others[partition] = list(records)
                continue
            kept = self._waiting.setdefault(partition, deque())
            for record in records:
                due_ms = due_ms_of(record.headers)
                early_s = 0.0 if due_ms is None else (due_ms - now_ms) / 1000
                kept.append((now + min(max(0.0, early_s), delay_s), record))
        return others

    def take(
        self, partitions: Collection[TopicPartition], limit: int, now: float
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        """What is due of these, at most `limit` records."""
        found: dict[TopicPartition, list[ConsumerRecord]] = {}
        for partition in partitions:
            kept = self._waiting.get(partition)
            taken: list[ConsumerRecord] = []
            while kept and kept[0][0] <= now and limit > 0:
                taken.append(kept.popleft()[1])
                limit -= 1
            if taken:
                found[partition] = taken
        self._waiting = {partition: kept for partition, kept in self._waiting.items() if kept}
        return found

    def holds(self, partition: TopicPartition) -> bool:
        """Whether something of it waits."""
        return partition in self._waiting

    def next_due(self, partitions: Collection[TopicPartition]) -> float | None:
        """When the first of these has something that is due; None if nothing of them waits."""
        return min((kept[0][0] for p in partitions if (kept := self._waiting.get(p))), default=None)

    def position(self, partition: TopicPartition) -> int | None:
        """The offset that is handed out next, None if nothing waits."""
        kept = self._waiting.get(partition)
        return kept[0][1].offset if kept else None

    def forget(self, partition: TopicPartition) -> None:
        """It is read anew."""
        self._waiting.pop(partition, None)

    def forget_all(self) -> None:
        """Everything is read anew."""
        self._waiting.clear()
