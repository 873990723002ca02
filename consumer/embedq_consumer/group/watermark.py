"""Partitions whose watermark stands still while others pass. Pure: time is an argument, one owner (the intake)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from embedq_shared.kafka import TopicPartition


class Lowest(msgspec.Struct, frozen=True):
    """The first unfinished record of a partition: nothing after it can be committed."""

    offset: int
    polled_at: float


class Overtaken(msgspec.Struct, frozen=True):
    """A record that others of its lane have overtaken, and for how long by now."""

    partition: TopicPartition
    offset: int
    seconds: float


class Watermarks:
    """Measures for how long each partition's first unfinished record has been overtaken.

    That is the time since a record of its lane that was polled later was answered. It is not the record's age: a bulk
    job may wait long in a deep queue, and that is no fault as long as those behind it wait, too. Nor is it the time
    since the last commit: a device that stands still holds up all records, and `/livez` tells of that.

    Invariants: a partition whose first unfinished record changes begins anew; what is not looked at is forgotten.
    """

    def __init__(self) -> None:
        self._since: dict[TopicPartition, tuple[int, float]] = {}

    def look(
        self, now: float, lowest: Mapping[TopicPartition, tuple[Lowest, float]]
    ) -> dict[TopicPartition, Overtaken]:
        """The overtaken ones. With each partition's first unfinished record comes when the newest answered record of its
        lane was polled; -inf if none was."""
        since: dict[TopicPartition, tuple[int, float]] = {}
        for partition, (first, newest_answered) in lowest.items():
            known = self._since.get(partition)
            if known is not None and known[0] == first.offset:
                since[partition] = known
            elif newest_answered > first.polled_at:
                since[partition] = first.offset, now
        self._since = since
        return {
            partition: Overtaken(partition, offset, now - begun)
            for partition, (offset, begun) in since.items()
        }
