"""Which answers may be published now, and the offsets that go with them. Pure: no clock, no I/O, one owner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import Reply
from embedq_consumer.group import Ticket
from embedq_shared.kafka import TopicPartition

Concluded = Callable[[Reply, bool], None]
"""Hears that an answer is published; or, with False, that its partition was lost and another replica repeats it."""


class Positions(Protocol):
    """What is known of the records in flight: the intake's ledger."""

    def unfinished(self, partition: TopicPartition) -> Iterable[int]:
        """The offsets of records taken and not finished, in order."""

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to take."""

    def epoch(self, partition: TopicPartition) -> int | None:
        """Of the partition's present assignment, None if it is not ours."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that waits for its turn: everything that is published for one record.

    The first `results` of the records are its result, the others its dead letter. `alone`: it shares no batch with others, since
    the brokers refuse a batch for the sake of one record.
    """

    reply: Reply
    records: Sequence[Outgoing]
    results: int
    concluded: Concluded
    letter_form: int = 0
    alone: bool = False

    @property
    def ticket(self) -> Ticket:
        """The record that it answers."""
        return self.reply.record.ticket

    @property
    def size(self) -> int:
        """Bytes to publish."""
        return sum(record.size for record in self.records)


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """What one transaction publishes and commits."""

    answers: Sequence[Held]
    offsets: dict[TopicPartition, int]
    """The next offset to read of each partition that has answers here."""

    @property
    def records(self) -> list[Outgoing]:
        """What is published, in order."""
        return [record for answer in self.answers for record in answer.records]


class HeldResults:
    """Answers that are complete and not published yet.

    Invariants:
        - A release holds, for each of its partitions, the answer of every unfinished record below the offset that it
          commits, and no other: so results and offsets say the same, whatever happens between two transactions.
        - An answer stays until `published`, so that a transaction that was not committed is tried again.
        - An answer of an assignment that is over is never released: the partition may have been another replica's since.
    """

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self._held: dict[TopicPartition, dict[int, Held]] = defaultdict(dict)

    def hold(self, answers: Iterable[Held]) -> None:
        """These are complete. One for a record that has an answer already replaces it."""
        for answer in answers:
            self._held[answer.ticket.partition][answer.ticket.offset] = answer

    def release(self, max_bytes: int) -> Release | None:
        """What may be published next, at most `max_bytes` or one answer; None if no partition's first record is answered."""
        answers: list[Held] = []
        offsets: dict[TopicPartition, int] = {}
        left = max_bytes
        for partition in sorted(self._held):
            taken = 0
            after = self._positions.position(partition)
            for offset, answer in self._in_order(partition):
                if answer is None or (answers and answer.size > left):
                    after = offset
                    break
                answers.append(answer)
                left -= answer.size
                taken += 1
            if taken and after is not None:
                offsets[partition] = after
        return Release(answers=answers, offsets=offsets) if answers else None

    def published(self, release: Release) -> None:
        """The release was committed."""
        for answer in release.answers:
            self._held[answer.ticket.partition].pop(answer.ticket.offset, None)

    def take_lost(self) -> list[Held]:
        """The answers of assignments that are over. They are held no longer."""
        lost = []
        for partition, held in self._held.items():
            epoch = self._positions.epoch(partition)
            stale = [offset for offset, answer in held.items() if answer.ticket.epoch != epoch]
            lost += [held.pop(offset) for offset in stale]
        return lost

    def __len__(self) -> int:
        """Answers held."""
        return sum(map(len, self._held.values()))

    def _in_order(self, partition: TopicPartition) -> Iterator[tuple[int, Held | None]]:
        """The unfinished records of a partition, each with its answer."""
        held, epoch = self._held[partition], self._positions.epoch(partition)
        for offset in self._positions.unfinished(partition):
            answer = held.get(offset)
            yield offset, answer if answer is not None and answer.ticket.epoch == epoch else None
