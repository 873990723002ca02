"""One place that records go to: what waits for it, what is under way, and how well it works. Pure: time is an argument."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Final

import msgspec

from embedq_consumer.delivery.broker_errors import meaning_of, name_of
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_shared.backoff import backoff
from embedq_shared.kafka import KafkaError

MAX_BATCH_BYTES: Final = 1_000_000
"""Of the records that the producer sends to a partition at once, and of those that it is handed beyond one such batch."""
MAX_BESIDE_BYTES: Final = 256_000
"""Of bulk results to a partition at once while interactive ones come: whose request waits until the broker has answered the one
before it."""
CONFIRM_S: Final = 2.0
"""A topic that was made a moment ago is not known to every broker yet."""
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0
PROBE_S: Final = 3.0
"""How long the one record may take that finds out whether a place that was given up works again."""
_FIRST_PROBE_S: Final = 1.0
_LONGEST_PROBE_S: Final = 30.0
_PROBATION_S: Final = 10.0
_LONGEST_PROBATION_S: Final = 600.0

HOPE: Final = 0.5
"""The share of its time for which a record waits for a place that worked until now, whatever waits behind it: with the default
of 30 s, longer than an election after a lost broker takes (9 s), or a broker that is cut off or frozen for a while."""

Urgent = Callable[[], bool]
"""Whether a record may wait no longer for a place that fails, since too much waits for it."""

Settled = Callable[[Exception | None], None]
"""Gets None once the brokers have the record, or why they will not."""


class Undelivered(KafkaError):  # type: ignore[misc]  # aiokafka has no type information
    """A place took a record not within the time that it was given; the message says what the brokers did meanwhile."""


def _never() -> bool:
    return False


class Parcel(msgspec.Struct, eq=False):
    """One record on its way.

    `timeout_s` is how long it may be tried, None for without end. What follows it is the publisher's. `sending` is what the
    producer returned for it, None while no producer has it: whatever another future says of it later does not count.
    """

    record: Outgoing
    settled: Settled
    timeout_s: float | None = None
    urgent: Urgent = _never
    serial: int = 0
    since: float = 0.0
    sent_at: float = 0.0
    size: int = 0
    sending: object | None = None
    alone: bool = False

    def accept(self, serial: int, now: float) -> None:
        """It begins its way."""
        self.serial = serial
        self.since = self.sent_at = now
        self.size = self.record.size

    def __lt__(self, other: Parcel) -> bool:
        """Older than the other one: in a destination they keep this order."""
        return self.serial < other.serial


class _Waiting:
    """Parcels that wait, oldest first."""

    __slots__ = ("_came", "_returned")

    def __init__(self) -> None:
        self._came: deque[Parcel] = deque()  # as they came
        self._returned: list[Parcel] = []  # a heap of what waited before, is older, and waits again

    def __len__(self) -> int:
        return len(self._came) + len(self._returned)

    def __iter__(self) -> Iterator[Parcel]:
        yield from self._returned
        yield from self._came

    def add(self, parcel: Parcel) -> None:
        """It waits behind older ones and before younger ones."""
        if self._came and parcel < self._came[-1]:
            heappush(self._returned, parcel)
        else:
            self._came.append(parcel)

    def first(self) -> Parcel:
        """The oldest."""
        return self._returned[0] if self._again else self._came[0]

    def pop(self) -> Parcel:
        """Take the oldest out."""
        return heappop(self._returned) if self._again else self._came.popleft()

    def remove(self, serials: Collection[int]) -> None:
        """These wait no more."""
        self._came = deque(parcel for parcel in self._came if parcel.serial not in serials)
        self._returned = [parcel for parcel in self._returned if parcel.serial not in serials]
        heapify(self._returned)

    @property
    def _again(self) -> bool:
        return bool(self._returned) and not (self._came and self._came[0] < self._returned[0])


class Destination:
    """One topic and partition.

    Invariants:
        - A parcel waits, is open (a producer has it) or is settled; open ones are in the order in which they were sent.
        - Express parcels go before others, and otherwise older ones before younger ones.
        - About `MAX_BATCH_BYTES` are open at most, or one parcel; and express ones of as many bytes more. So a producer has
          room for them.
        - A parcel that is sent alone shares no batch, since nothing else is open.
        - It fails (`failing_since`) from the first failure until a record is taken. `apart` begins with a failure, and ends
          after a probation that is twice as long each time.
    """

    def __init__(self, place: Place, *, ours: bool = False) -> None:
        """`ours`: of a topic of embedq's own, which nothing but the brokers can make fail."""
        self.place = place
        self._express = _Waiting()
        self._others = _Waiting()
        self.apart = False
        self.failing_since: float | None = None
        self.error: BaseException | None = None
        self.given_up = False
        self.used_at = 0.0
        self._open: dict[int, Parcel] = {}
        self._open_bytes = 0
        self._burst = 0
        self._failures = 0
        self._retry_at = 0.0
        self._probe_at = 0.0
        self._probes = 0
        self._well_since: float | None = None
        self._relapses = 0
        self.in_good_standing: bool | None = True if ours else None
        """Whether it works, or did until it began to fail; False once it was given up, None for one that never had a record."""

    # -- what it holds --------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything waits or is open."""
        return bool(self._express or self._others or self._open)

    @property
    def idle(self) -> bool:
        """Whether no producer has anything for it."""
        return not self._open

    def __len__(self) -> int:
        return len(self._express) + len(self._others) + len(self._open)

    @property
    def has_waiting(self) -> bool:
        """Whether anything waits for a producer."""
        return bool(self._express or self._others)

    def waiting(self) -> list[Parcel]:
        """What no producer has, oldest first."""
        return sorted([*self._express, *self._others])

    def parcels(self) -> list[Parcel]:
        """Everything on its way here, oldest first."""
        return [*self._open.values(), *self.waiting()]

    def add(self, parcel: Parcel) -> None:
        """It waits here, behind older ones and before younger ones."""
        (self._express if parcel.record.express else self._others).add(parcel)

    def oldest_open(self) -> Parcel | None:
        """The parcel that a producer has had for longest."""
        return next(iter(self._open.values()), None)

    def take(
        self, now: float, *, beside: bool = False, express: bool = False, most: int = sys.maxsize
    ) -> list[Parcel]:
        """The parcels to hand to a producer now, `most` at most, in this order: they are taken out of those that wait, and are to be
        `opened`, or added again.

        `beside` interactive work less is open of what is not express; `express`: only such ones.
        """
        if now < self._retry_at:
            return []
        first, size = self.oldest_open(), self._open_bytes
        taken: list[Parcel] = []
        kinds = [(self._express, 2 * MAX_BATCH_BYTES)]
        if not express:
            kinds.append((self._others, MAX_BESIDE_BYTES if beside else MAX_BATCH_BYTES))
        for waiting, limit in kinds:
            while waiting and len(taken) < most:
                parcel = waiting.first()
                if first is None:
                    first = parcel
                elif first.alone or parcel.alone or size + parcel.size > limit:
                    return taken
                size += parcel.size
                taken.append(waiting.pop())
        return taken

    def opened(self, parcels: Sequence[Parcel], sending: object, now: float) -> None:
        """A producer has them, in one batch."""
        self._burst = (self._burst if self._open else 0) + len(parcels)
        for parcel in parcels:
            parcel.sending = sending
            parcel.sent_at = now
            self._open[parcel.serial] = parcel
            self._open_bytes += parcel.size

    def closed(self, parcel: Parcel) -> None:
        """The producer is done with it, in whatever way."""
        if self._open.pop(parcel.serial, None) is not None:
            self._open_bytes -= parcel.size
        parcel.sending = None

    def recall(self) -> None:
        """What is open waits again. Its producer may still deliver it, so that some of it may arrive twice."""
        for parcel in list(self._open.values()):
            self.closed(parcel)
            self.add(parcel)

    def shared(self, parcel: Parcel) -> bool:
        """Whether a batch that held this parcel may have been refused because of others."""
        return not parcel.alone and self._burst > 1

    def remove(self, parcels: Collection[Parcel]) -> None:
        """These are on their way here no more."""
        gone = {parcel.serial for parcel in parcels}
        for parcel in parcels:
            if parcel.serial in self._open:
                self.closed(parcel)
        self._express.remove(gone)
        self._others.remove(gone)

    # -- how well it works ----------------------------------------------------------------------------------------------

    def note_taken(self, now: float) -> None:
        """The brokers took a record here."""
        self.failing_since = None
        self.given_up = False
        self.in_good_standing = True
        self._failures = self._probes = 0
        self._retry_at = 0.0
        if self.apart and self._well_since is None:
            self._well_since = now

    def note_failure(self, error: BaseException, now: float, since: float) -> None:
        """It failed; `since` is when what failed was sent. Failures of one batch count once."""
        self.set_apart()
        if self.failing_since is None:
            self.failing_since = since
        self.error = error
        if now >= self._retry_at:
            pause = backoff(self._failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            self._retry_at = now + pause
            self._failures += 1

    def set_apart(self) -> None:
        """Records go there on a connection of their own, until it has worked for a while."""
        if not self.apart or self._well_since is not None:
            self._relapses += 1
        self.apart = True
        self._well_since = None

    def may_return(self, now: float) -> bool:
        """Whether its probation is over."""
        span = min(_LONGEST_PROBATION_S, _PROBATION_S * 2.0 ** (self._relapses - 1))
        return self._well_since is not None and now - self._well_since >= span

    def rejoin(self) -> None:
        """Records go there together with all others again."""
        self.apart = False
        self._well_since = None

    def excuse(self, seconds: float, now: float) -> None:
        """We heard nothing for so long, whoever spoke: that is no time in which parcels waited for the brokers."""
        for parcel in self.parcels():
            parcel.since = min(now, parcel.since + seconds)
            parcel.sent_at = min(now, parcel.sent_at + seconds)

    def forgive(self, now: float) -> None:
        """All brokers were away: how long it failed begins anew."""
        if self.failing_since is not None:
            self.failing_since = now
        self._retry_at = 0.0

    def give_up(self, now: float) -> None:
        """It failed for too long: from here on records are refused at once, but for one now and then."""
        self.given_up = True
        self.in_good_standing = False
        self._probe_at = now + backoff(self._probes, first_s=_FIRST_PROBE_S, longest_s=_LONGEST_PROBE_S)
        self._probes += 1

    def may_heal(self, timeout_s: float, now: float, *, others_lost: bool) -> bool:
        """Whether a record with this time-out waits for it even if much waits behind: it worked until it began to fail, which
        was not long ago. A broker was lost, say, and a leader is being elected. Of a place that was never tried before, this is
        believed where such ones fail as well (`others_lost`)."""
        believed = others_lost if self.in_good_standing is None else self.in_good_standing
        return believed and self.failing_since is not None and now - self.failing_since < HOPE * timeout_s

    def pauses(self, now: float) -> bool:
        """Whether it is too early to try again."""
        return now < self._retry_at

    def accepts(self, parcel: Parcel, now: float) -> bool:
        """Whether this parcel may try; of those that would end after a time, one in a while where it was given up."""
        if not self.given_up or parcel.timeout_s is None:
            return True
        if now < self._probe_at or self.busy:
            return False
        parcel.timeout_s = min(parcel.timeout_s, PROBE_S)
        return True

    def avoided(self, now: float) -> bool:
        """Whether records that can go elsewhere should."""
        return self.failing_since is not None and (self.busy or now < max(self._retry_at, self._probe_at))

    def confirmed(self, now: float) -> bool:
        """Whether the brokers have said for long enough that there is no such place."""
        return (
            self.failing_since is not None
            and self.error is not None
            and meaning_of(self.error).action == "confirm"
            and now - self.failing_since >= CONFIRM_S
        )

    def undelivered(self, now: float, since: float | None = None) -> Undelivered:
        """Why its parcels are given up; `since` is when the oldest came, which counts where the place does not fail."""
        failing = self.failing_since
        if failing is None or self.error is None:
            return Undelivered(f"within {now - (since or now):.0f} s they took less than was sent to them")
        said = f"the brokers {meaning_of(self.error).text} ({name_of(self.error)})"
        return Undelivered(f"for {now - failing:.0f} s they took no record: {said}")


class Presence:
    """Whether Kafka takes anything from us at all. Pure: time is an argument.

    It is away once something has waited for `AWAY_S` and nothing was taken anywhere in that time, in which we listened.
    """

    AWAY_S: Final = 7.0
    """More than two of the status records, which are sent every 3 s, so that a service without jobs knows it as well."""

    def __init__(self, now: float) -> None:
        self.taken_at = now
        self.back_at = now
        self.away_since: float | None = None
        self._pending_since: float | None = None
        self._deaf_s = 0.0
        """Of the time since something was taken, or began to wait."""

    @property
    def away(self) -> bool:
        """Whether Kafka takes nothing from us at all."""
        return self.away_since is not None

    def note_taken(self, now: float) -> bool:
        """A record was taken. True if Kafka had been away."""
        self.taken_at = now
        self._pending_since = None
        self._deaf_s = 0.0
        if self.away_since is None:
            return False
        self.away_since = None
        self.back_at = now
        return True

    def excuse(self, seconds: float) -> None:
        """We heard nothing for so long, whoever spoke."""
        self._deaf_s += seconds

    def look(self, now: float, *, pending: bool) -> bool:
        """Called again and again. True if Kafka has just gone away."""
        if not pending:
            self._pending_since = None
            return False
        if self._pending_since is None:
            self._pending_since = now
            self._deaf_s = 0.0
        silent_since = max(self.taken_at, self._pending_since)
        if self.away_since is None and now - silent_since - self._deaf_s > self.AWAY_S:
            self.away_since = silent_since
            return True
        return False

    def took_since(self, since: float, span: float) -> bool:
        """Whether records were taken in the second half of `span` seconds after `since`: else silence says nothing of one
        place, since all are silent."""
        return self.away_since is None and self.taken_at >= since + span / 2
