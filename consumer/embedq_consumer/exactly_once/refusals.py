"""What a record that a transaction could not publish means for the next one. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from embedq_consumer.delivery.broker_errors import meaning_of, name_of
from embedq_consumer.delivery.destination import CONFIRM_S, Undelivered
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_shared.kafka import KafkaError, partition_of

Verdict = Literal["published", "alone", "again"]


class Refusals:
    """Remembers since when each place has taken nothing.

    Invariants:
        - A record is given up only after it was refused in a batch of its own; or, at a caller's address, after the place took
          nothing for `timeout_s` while Kafka was there. What goes to embedq's own topics is given up for the first reason alone.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._failing_since: dict[Place, float] = {}

    def note_taken(self, places: Sequence[Place]) -> None:
        """The brokers took records there."""
        for place in places:
            self._failing_since.pop(place, None)

    def forgive(self, now: float) -> None:
        """Kafka was away: how long each place failed begins anew."""
        self._failing_since = dict.fromkeys(self._failing_since, now)

    def place_for(self, record: Outgoing, partitions: int) -> Place:
        """The place that the record names, or that its key decides; or the next one that is in order, where that will do."""
        wanted = record.partition
        if wanted is None:
            wanted = 0 if record.key is None else partition_of(record.key, partitions)
        if not record.movable:
            return record.topic, wanted
        places = [(record.topic, (wanted + step) % partitions) for step in range(partitions)]
        return next((place for place in places if place not in self._failing_since), places[0])

    def judge(
        self,
        record: Outgoing,
        place: Place,
        error: KafkaError,
        now: float,
        *,
        addressed: bool,
        alone: bool,
    ) -> Verdict | KafkaError:
        """What to do with a record that failed at a place: an error is why it is given up."""
        meaning = meaning_of(error)
        own_topic_failed = meaning.scope == "topic" and not addressed
        if meaning.action == "refuse" and not own_topic_failed:
            return error if alone else "alone"
        since = self._failing_since.setdefault(place, now)
        if not addressed:
            return "again"
        if meaning.action == "confirm" and now - since >= CONFIRM_S:
            return error
        if now - since >= self._timeout_s:
            said = f"the brokers {meaning.text} ({name_of(error)})"
            return Undelivered(f"for {now - since:.0f} s it took no record: {said}")
        return "again"
