"""Which offsets are safe to commit. Pure: no clock, no I/O, one owner (the intake)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from embedq_shared.kafka import TopicPartition


class Ticket(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """One record taken during one assignment of its partition."""

    partition: TopicPartition
    epoch: int
    offset: int


class _Partition:
    __slots__ = ("committed", "epoch", "next", "open", "start", "started", "topic_id")

    def __init__(self, epoch: int, start: int | None, topic_id: str) -> None:
        self.epoch = epoch
        self.topic_id = topic_id
        # In the order taken, which is the offsets' order: the first key is the lowest unfinished one. True once it is started.
        self.open: dict[int, bool] = {}
        self.started = 0
        self.start = start
        self.next: int | None = None
        self.committed = start


class OffsetLedger:
    """Knows every record taken and not yet finished, for each partition and epoch: the time from one assignment of it to us
    until it is not ours any more. A record that was taken waits, until it is started.

    Invariants:
        - `committable()` never passes a record that is begun and not finished.
        - It counts the records that were delivered, never offset arithmetic: compaction and transaction markers leave gaps.
        - A ticket of an earlier epoch changes nothing: its partition may have belonged to another replica since.
        - Within an epoch, what is committable never goes back, and begins at the committed offset.
        - Offsets from the committed one on that no record had are noted, until `take_skipped`.
    """

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._skipped: dict[TopicPartition, range] = {}
        self._epoch = 0

    def add(
        self, partition: TopicPartition, start: int | None, *, topic_id: str = "", is_new: bool = False
    ) -> None:
        """It is ours from now on, a new epoch; `start` is its committed offset, None if there is none.

        `topic_id` is "" if it is not known. `is_new`: nothing is committed of this topic, whatever the brokers have under its
        name, so `start` is to be committed even if no record comes.
        """
        self._epoch += 1
        state = self._partitions[partition] = _Partition(self._epoch, start, topic_id)
        if is_new:
            state.next, state.committed = start, None

    def name_topic(self, partition: TopicPartition, topic_id: str) -> None:
        """The id of its topic is known now."""
        self._partitions[partition].topic_id = topic_id

    def topic_id(self, partition: TopicPartition) -> str:
        """Of the topic that its offsets are of; "" if that is not known."""
        state = self._partitions.get(partition)
        return "" if state is None else state.topic_id

    def drop(self, partitions: Iterable[TopicPartition]) -> None:
        """These are not ours any more."""
        for partition in partitions:
            self._partitions.pop(partition, None)
            self._skipped.pop(partition, None)

    def begin(self, partition: TopicPartition, offset: int) -> Ticket:
        """Take one record. Offsets of a partition must rise.

        Raises:
            KeyError: the partition is not assigned.
            ValueError: the offset was taken already.
        """
        state = self._partitions[partition]
        if state.next is not None and offset < state.next:
            raise ValueError(f"offset {offset} of {partition} taken twice. This is a bug.")
        if state.next is None and state.committed is not None and offset < state.committed:
            state.committed = None  # the topic was made anew
        known = state.committed if state.next is None else state.next
        if known is not None and offset > known:
            self.skip({partition: range(known, offset)})
        state.open[offset] = False
        state.next = offset + 1
        return Ticket(partition, state.epoch, offset)

    def advance(self, partition: TopicPartition, position: int) -> None:
        """Everything below `position` was delivered: it steps over markers and gaps after the last record."""
        state = self._partitions.get(partition)
        known = self.position(partition)
        if state is not None and (known is None or position > known):
            if known is not None:
                self.skip({partition: range(known, position)})
            state.next = position

    def skip(self, offsets: Mapping[TopicPartition, range]) -> None:
        """Note that these were stepped over: no record was handed out of them."""
        for partition, these in offsets.items():
            former = self._skipped.get(partition, these)
            self._skipped[partition] = range(min(former.start, these.start), max(former.stop, these.stop))

    def take_skipped(self) -> dict[TopicPartition, range]:
        """Offsets that were stepped over since the last time; of several gaps of a partition, from the first to the last."""
        found, self._skipped = self._skipped, {}
        return found

    def goes_back(self, partition: TopicPartition, offset: int) -> bool:
        """Whether this offset is below what was taken: it is of another topic of the same name, or of one that lost its end."""
        state = self._partitions.get(partition)
        return state is not None and state.next is not None and offset < state.next

    def start(self, ticket: Ticket) -> None:
        """Work on it begins. Nothing if its epoch is over."""
        state = self._partitions.get(ticket.partition)
        if state is not None and state.epoch == ticket.epoch and state.open.get(ticket.offset) is False:
            state.open[ticket.offset] = True
            state.started += 1

    def finish(self, ticket: Ticket) -> bool:
        """The record is answered. False if its epoch is over or it was finished before."""
        state = self._partitions.get(ticket.partition)
        if state is None or state.epoch != ticket.epoch or ticket.offset not in state.open:
            return False
        state.started -= state.open.pop(ticket.offset)
        return True

    def committable(self) -> dict[TopicPartition, int]:
        """The next offset to read after a crash, for each partition where it rose since `note_committed`."""
        found = {}
        for partition, state in self._partitions.items():
            safe = self.safe(partition)
            if safe is not None and (state.committed is None or safe > state.committed):
                found[partition] = safe
        return found

    def safe(self, partition: TopicPartition) -> int | None:
        """The next offset to read after a crash, whether it rose or not; None while none was taken in this epoch."""
        state = self._partitions.get(partition)
        return None if state is None or state.next is None else next(iter(state.open), state.next)

    def note_committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The broker took these offsets."""
        for partition, offset in offsets.items():
            state = self._partitions.get(partition)
            if state is not None and (state.committed is None or offset > state.committed):
                state.committed = offset

    def unfinished(self, partition: TopicPartition) -> Iterable[int]:
        """The offsets of records taken and not finished, in order."""
        state = self._partitions.get(partition)
        return () if state is None else state.open

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to take; None: the first one that there is."""
        state = self._partitions.get(partition)
        if state is None:
            return None
        return state.start if state.next is None else state.next

    def lowest(self, partition: TopicPartition) -> Ticket | None:
        """The first record that is started and not finished."""
        state = self._partitions.get(partition)
        if state is None or not state.started:
            return None
        return Ticket(
            partition, state.epoch, next(offset for offset, started in state.open.items() if started)
        )

    def epoch(self, partition: TopicPartition) -> int | None:
        """Of the partition's present assignment; no other one has it."""
        state = self._partitions.get(partition)
        return None if state is None else state.epoch

    def in_flight(self, partition: TopicPartition) -> int:
        """Records started and not finished."""
        state = self._partitions.get(partition)
        return 0 if state is None else state.started

    def committed(self, partition: TopicPartition) -> int | None:
        """The offset that the broker has, as far as is known."""
        state = self._partitions.get(partition)
        return None if state is None else state.committed

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """What is ours, and its start is known."""
        return frozenset(self._partitions)
