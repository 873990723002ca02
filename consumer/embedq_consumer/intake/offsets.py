"""Which offsets are safe to commit. Pure: no clock, no I/O, one owner (the intake)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from embedq_shared.kafka import TopicPartition


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """One record taken during one assignment of its partition."""

    partition: TopicPartition
    epoch: int
    offset: int


class _Partition:
    __slots__ = ("committed", "epoch", "next", "open")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        # In the order taken, which is the offsets' order: the first key is the lowest unfinished one.
        self.open: dict[int, None] = {}
        self.next: int | None = None
        self.committed: int | None = None


class OffsetLedger:
    """Knows every record taken and not yet finished, for each partition and assignment epoch.

    Invariants:
        - `committable()` never passes a record that is begun and not finished.
        - It counts the records that were delivered, never offset arithmetic: compaction and transaction markers leave gaps.
        - A ticket of an earlier epoch changes nothing: its partition may belong to another replica by now.
        - Within an epoch, what is committable never goes back.
    """

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._epoch = 0

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Start a new epoch with these partitions and no others."""
        self._epoch += 1
        self._partitions = {partition: _Partition(self._epoch) for partition in partitions}

    def begin(self, partition: TopicPartition, offset: int) -> Ticket:
        """Take one record. Offsets of a partition must rise.

        Raises:
            KeyError: the partition is not assigned.
            ValueError: the offset was taken already.
        """
        state = self._partitions[partition]
        if state.next is not None and offset < state.next:
            raise ValueError(f"offset {offset} of {partition} taken twice. This is a bug.")
        state.open[offset] = None
        state.next = offset + 1
        return Ticket(partition, state.epoch, offset)

    def advance(self, partition: TopicPartition, position: int) -> None:
        """Everything below `position` was delivered: it steps over markers and gaps after the last record."""
        state = self._partitions.get(partition)
        if state is not None and (state.next is None or position > state.next):
            state.next = position

    def finish(self, ticket: Ticket) -> bool:
        """The record is answered. False if its epoch is over or it was finished before."""
        state = self._partitions.get(ticket.partition)
        if state is None or state.epoch != ticket.epoch or ticket.offset not in state.open:
            return False
        del state.open[ticket.offset]
        return True

    def committable(self) -> dict[TopicPartition, int]:
        """The next offset to read after a crash, for each partition where it rose since `note_committed`."""
        found = {}
        for partition, state in self._partitions.items():
            if state.next is None:
                continue
            safe = next(iter(state.open), state.next)
            if state.committed is None or safe > state.committed:
                found[partition] = safe
        return found

    def note_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The broker took these offsets."""
        for partition, offset in offsets.items():
            state = self._partitions.get(partition)
            if state is not None and (state.committed is None or offset > state.committed):
                state.committed = offset

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to take, None while none was taken in this epoch."""
        state = self._partitions.get(partition)
        return None if state is None else state.next

    def committed(self, partition: TopicPartition) -> int | None:
        """The last offset that was given to `note_committed` in this epoch."""
        state = self._partitions.get(partition)
        return None if state is None else state.committed

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """What is assigned."""
        return frozenset(self._partitions)

    @property
    def epoch(self) -> int:
        """Counts assignments."""
        return self._epoch

    @property
    def in_flight(self) -> int:
        """Records begun and not finished in this epoch."""
        return sum(len(state.open) for state in self._partitions.values())
