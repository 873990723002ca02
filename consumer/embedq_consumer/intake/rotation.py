"""Whose turn it is at the next poll. Pure, one owner (the intake)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sized

from aiokafka import TopicPartition


class PartitionRotation:
    """Lets every partition give records before one gives a second time.

    The client hands out all that it has fetched of one partition, which may be megabytes, before it looks at the next. So
    those that filled a poll are left out of the next ones, until the others have nothing there.
    """

    def __init__(self) -> None:
        self._had: set[TopicPartition] = set()

    def next(self, partitions: Collection[TopicPartition]) -> list[TopicPartition]:
        """Those of `partitions` that had no turn yet. They are worth a wait only if that is all of them."""
        self._had &= set(partitions)
        if len(self._had) == len(partitions):
            self._had.clear()
        return [partition for partition in partitions if partition not in self._had]

    def note(self, polled: Mapping[TopicPartition, Sized], limit: int, *, drained: bool = True) -> None:
        """What a poll for at most `limit` records gave; `drained`: it named all whose turn it was."""
        if sum(map(len, polled.values())) >= limit:
            self._had |= polled.keys()
        elif drained:
            self._had.clear()  # of those whose turn it was, nobody has more
