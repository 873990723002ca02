"""All places that records go to, side by side: where a record should go, which have waited too long. Pure: time is an argument."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

from embedq_consumer.delivery.broker_errors import name_of
from embedq_consumer.delivery.destination import Destination, Parcel, Presence
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_shared.kafka import partitions_of

IDLE_S: Final = 60.0
FORGET_S: Final = 600.0
"""A place that failed and has had nothing since is remembered so long, for its probation."""

Ended = tuple[Parcel, Exception]
"""A parcel that is given up, and why."""


class Places:
    """The places by name, and whether Kafka is there (`presence`).

    Invariants:
        - Only parcels with a time-out are given up, and never while Kafka is away: silence of all says nothing of one.
        - What waits for failing places is at most `max_held` parcels, but for those without a time-out and for those of a
          place that may heal soon: a lost broker costs no job its answer, however many come while a leader is elected.
    """

    def __init__(
        self,
        partitions: Callable[[str], int | None],
        *,
        max_held: int,
        now: float,
        ours: Collection[str] = (),
    ) -> None:
        """`partitions`: how many a topic has. `ours`: embedq's own topics."""
        self._partitions = partitions
        self._ours = frozenset(ours)
        self._max_held = max_held
        self._places: dict[Place, Destination] = {}
        self.presence = Presence(now)

    def __iter__(self) -> Iterator[Destination]:
        """As they are now, whatever is added or forgotten meanwhile."""
        return iter(list(self._places.values()))

    def at(self, place: Place) -> Destination:
        """The destination of this name, made if need be."""
        if (found := self._places.get(place)) is None:
            found = self._places[place] = Destination(place, ours=place[0] in self._ours)
        return found

    def wanted(self, records: Sequence[Outgoing]) -> list[int]:
        """The partition that each record names, or that its key decides."""
        found = [record.partition or 0 for record in records]
        keyed: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(records):
            if record.partition is None and record.key is not None:
                keyed[record.topic].append(index)
        for topic, indices in keyed.items():
            keys = [key for index in indices if (key := records[index].key) is not None]
            for index, partition in zip(indices, partitions_of(keys, self._count(topic)), strict=True):
                found[index] = partition
        return found

    def destination_of(self, record: Outgoing, wanted: int, now: float) -> Destination:
        """The place of the partition that is wanted; or the next one that is in order, if that will do."""
        topic = record.topic
        first = found = self.at((topic, wanted))
        if found.failing_since is None or not record.movable:
            return found
        partitions = self._count(topic)
        for step in range(1, partitions):
            if not found.avoided(now):
                return found
            found = self.at((topic, (wanted + step) % partitions))
        return first if found.avoided(now) else found

    def _count(self, topic: str) -> int:
        """How many partitions a topic has."""
        return self._partitions(topic) or 1

    def withdraw(self, records: Sequence[Outgoing]) -> None:
        """Those of these records that no producer has will not be sent."""
        stale = {id(record) for record in records}
        for destination in self:
            destination.remove([one for one in destination.waiting() if id(one.record) in stale])

    def forget_idle(self, now: float) -> list[tuple[Place, bool]]:
        """The places that have had nothing for a while; True for those that are forgotten, too."""
        found: list[tuple[Place, bool]] = []
        for destination in self:
            idle_s = now - destination.used_at
            if destination.busy or idle_s < IDLE_S:
                continue
            forgotten = not destination.apart or idle_s > FORGET_S
            if forgotten:
                del self._places[destination.place]
            found.append((destination.place, forgotten))
        return found

    def knows(self, topic: str) -> bool:
        """Whether any of its partitions is remembered."""
        return any(name == topic for name, _ in self._places)

    def note_taken(self, now: float) -> bool:
        """Records were taken somewhere. True if Kafka was away until now: then each place has all of its time again."""
        if not self.presence.note_taken(now):
            return False
        for destination in self:
            destination.forgive(now)
        return True

    def excuse(self, seconds: float, now: float) -> None:
        """Our event loop stood still for so long until `now`: nobody's silence in that time counts."""
        self.presence.excuse(seconds)
        for destination in self:
            destination.excuse(seconds, now)

    def just_went_away(self, now: float) -> bool:
        """Look whether Kafka is there; True the first time that it is not."""
        return self.presence.look(now, pending=any(destination.busy for destination in self))

    # -- what has waited too long -----------------------------------------------------------------------------------------

    def silent(self, destination: Destination, patience_s: float, now: float) -> float | None:
        """Since when a producer has had a record of this place without an answer, if that is too long."""
        oldest = destination.oldest_open()
        if oldest is None or now - oldest.sent_at <= patience_s:
            return None
        return oldest.sent_at if self.presence.took_since(oldest.sent_at, patience_s) else None

    def overdue(self, destination: Destination, now: float) -> list[Ended]:
        """What is given up of this place now; it is taken out."""
        if not destination.apart or self.presence.away_since is not None:
            return []
        timed = [parcel for parcel in destination.parcels() if parcel.timeout_s is not None]
        if destination.confirmed(now) and isinstance(destination.error, Exception):
            ended = [(parcel, destination.error) for parcel in timed]
        else:
            failing = destination.failing_since
            late = [parcel for parcel in timed if self._is_late(parcel, now)]
            if late and failing is not None:
                destination.give_up(now)
                late = timed  # it has failed for all of them
            elif failing is not None:
                late = [parcel for parcel in self._without_hope(destination, now) if parcel.urgent()]
            if not late:
                return []
            reason = destination.undelivered(now, min(parcel.since for parcel in late))
            ended = [(parcel, reason) for parcel in late]
        destination.remove([parcel for parcel, _ in ended])
        return ended

    def _is_late(self, parcel: Parcel, now: float) -> bool:
        since = max(parcel.since, self.presence.back_at)
        limit = parcel.timeout_s
        return limit is not None and now - since >= limit and self.presence.took_since(since, limit)

    def excess(self, now: float) -> list[Ended]:
        """What is given up so that failing places hold no more than they may: the oldest of those with most."""
        if self.presence.away_since is not None:
            return []
        failing = [
            (one, self._without_hope(one, now)) for one in self if one.failing_since is not None and one.busy
        ]
        excess = sum(len(parcels) for _, parcels in failing) - self._max_held
        ended: list[Ended] = []
        for destination, parcels in sorted(failing, key=lambda each: len(each[1]), reverse=True):
            if excess <= 0:
                break
            oldest = parcels[:excess]
            reason = destination.undelivered(now)
            destination.remove(oldest)
            ended += [(parcel, reason) for parcel in oldest]
            excess -= len(oldest)
        return ended

    def _without_hope(self, destination: Destination, now: float) -> list[Parcel]:
        """Those of a failing place's parcels that would end after a time and do not wait until it heals, oldest first."""
        lost = any(one.in_good_standing and one.failing_since is not None for one in self)
        return [
            parcel
            for parcel in destination.parcels()
            if parcel.timeout_s is not None
            and not destination.may_heal(parcel.timeout_s, now, others_lost=lost)
        ]

    def elsewhere(self, destination: Destination, now: float) -> list[Destination]:
        """Move what waits for a failing place, and may, to others of its topic: those others."""
        if destination.failing_since is None or self.presence.away_since is not None:
            return []
        moved: list[Parcel] = []
        others: dict[Place, Destination] = {}
        movable = [parcel for parcel in destination.waiting() if parcel.record.movable]
        for parcel, wanted in zip(movable, self.wanted([one.record for one in movable]), strict=True):
            other = self.destination_of(parcel.record, wanted, now)
            if other is not destination:
                moved.append(parcel)
                parcel.alone = False
                others[other.place] = other
                other.add(parcel)
        if moved:
            destination.remove(moved)  # all at once: it looks through all that waits, which may be thousands
        return list(others.values())

    # -- what to say of it --------------------------------------------------------------------------------------------------

    def trouble(self, said: str, now: float) -> str | None:
        """Why this replica should get no jobs, if so; `said` is the brokers' latest reason."""
        away_since = self.presence.away_since
        if away_since is not None:
            return f"Kafka has taken nothing for {now - away_since:.0f} s ({said})"
        for destination in self:
            since, error = destination.failing_since, destination.error
            if since is None or error is None or now - since < Presence.AWAY_S:
                continue
            if any(parcel.timeout_s is None for parcel in destination.parcels()):
                topic = destination.place[0]
                return f"topic {topic} has taken nothing for {now - since:.0f} s ({name_of(error)})"
        return None
