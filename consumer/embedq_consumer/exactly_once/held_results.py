"""Which results may be published now, and the offsets that go with them. Pure: no clock, no I/O, one owner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import Reply
from embedq_shared.kafka import TopicPartition


class Positions(Protocol):
    """What is known of the records in flight: the intake's ledger."""

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """What is assigned."""

    def unfinished(self, partition: TopicPartition) -> Iterable[int]:
        """The offsets of records taken and not finished, in order."""

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to take."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that waits for its turn: everything that is published for one record."""

    reply: Reply
    records: Sequence[Outgoing]

    @property
    def size(self) -> int:
        """Bytes to publish."""
        return sum(len(record.value or b"") for record in self.records)


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """What one transaction publishes and commits."""

    answers: Sequence[Held]
    offsets: dict[TopicPartition, int]
    """The next offset to read of each partition that has answers here."""


class HeldResults:
    """Answers that are complete and not published yet.

    Invariants:
        - A release holds, for each of its partitions, the answer of every unfinished record below the offset that it
          commits, and no other: so results and offsets say the same, whatever happens between two transactions.
        - An answer stays until `published` or `keep`, so that a transaction that was not committed is tried again.
    """

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self._held: dict[TopicPartition, dict[int, Held]] = defaultdict(dict)

    def hold(self, answers: Iterable[Held]) -> None:
        """These are complete. One for a record that has an answer already replaces it."""
        for answer in answers:
            ticket = answer.reply.record.ticket
            self._held[ticket.partition][ticket.offset] = answer

    def release(self, max_bytes: int) -> Release | None:
        """What may be published next, at most `max_bytes` or one answer; None if the first of every partition is not complete."""
        answers: list[Held] = []
        offsets: dict[TopicPartition, int] = {}
        left = max_bytes
        for partition in sorted(self._held):
            taken = 0
            for offset, answer in self._prefix(partition):
                if answer is None or (answers and answer.size > left):
                    after: int | None = offset
                    break
                answers.append(answer)
                left -= answer.size
                taken += 1
            else:
                after = self._positions.position(partition)
            if taken and after is not None:
                offsets[partition] = after
        return Release(answers=answers, offsets=offsets) if answers else None

    def published(self, release: Release) -> None:
        """The release was committed."""
        for answer in release.answers:
            ticket = answer.reply.record.ticket
            self._held[ticket.partition].pop(ticket.offset, None)

    def take_lost(self) -> list[Held]:
        """The answers of partitions that belong to another replica now, which repeats them. They are held no longer."""
        lost = [partition for partition in self._held if partition not in self._positions.partitions]
        return [answer for partition in lost for answer in self._held.pop(partition).values()]

    def __len__(self) -> int:
        """Answers held."""
        return sum(map(len, self._held.values()))

    def _prefix(self, partition: TopicPartition) -> Iterator[tuple[int, Held | None]]:
        """The unfinished records of a partition in order, each with its answer."""
        held = self._held[partition]
        for offset in self._positions.unfinished(partition):
            yield offset, held.get(offset)
