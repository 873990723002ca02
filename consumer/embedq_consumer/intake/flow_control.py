"""What the next poll may read: back-pressure and fairness between partitions. Pure, one owner (the intake)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sized
from typing import Final

import msgspec

from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import LANES, Lane

_RESUME_AT: Final = 0.5
"""A full lane takes records again once this share is left: then whole polls, and not one record for each result."""
_RESUME_JOBS: Final = 1024
"""So many free places are enough in any case: two polls. Half of a large lane would come in one long burst."""
_SPAN_S: Final = 0.5
"""A rate is measured over so long: a few micro-batches, of which each answers its jobs at once."""
_SPANS: Final = 20
"""And the best of the last ten seconds counts."""


class InFlightLimits:
    """Counts jobs and bytes of each lane, waiting ones and started ones, and says which lanes are full.

    Invariants: every `add` has one `remove`; with nothing in flight all counts are zero and no lane is full.
    """

    def __init__(self, *, max_jobs: int, max_bytes: int) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._bytes: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._full: dict[Lane, bool] = dict.fromkeys(LANES, False)

    def add(self, lane: Lane, size: int) -> None:
        """A job of `size` bytes is in flight."""
        self._jobs[lane] += 1
        self._bytes[lane] += size
        if self._jobs[lane] >= self._max_jobs or self._bytes[lane] >= self._max_bytes:
            self._full[lane] = True

    def remove(self, lane: Lane, size: int, jobs: int = 1) -> bool:
        """Jobs of `size` bytes together are answered. True if the lane has just stopped being full."""
        self._jobs[lane] -= jobs
        self._bytes[lane] -= size
        if self._jobs[lane] < 0 or self._bytes[lane] < 0:
            raise RuntimeError("more was removed than added. This is a bug.")
        if not self._full[lane]:
            return False
        reopened = (
            self._jobs[lane] <= max(self._max_jobs * _RESUME_AT, self._max_jobs - _RESUME_JOBS)
            and self._bytes[lane] <= self._max_bytes * _RESUME_AT
        )
        self._full[lane] = not reopened
        return reopened

    def is_full(self, lane: Lane) -> bool:
        """Whether the lane's partitions should give no records."""
        return self._full[lane]

    def headroom(self) -> int:
        """How many more jobs the emptiest lane that is not full takes."""
        return max((self._max_jobs - self._jobs[lane] for lane in LANES if not self._full[lane]), default=0)

    def jobs(self, lane: Lane) -> int:
        """Jobs in flight."""
        return self._jobs[lane]

    def bytes(self, lane: Lane) -> int:
        """Bytes in flight."""
        return self._bytes[lane]


class ReadAhead:
    """How many jobs of a lane should be started: as many as it answers in some seconds, at its best of late.

    What is started keeps the device busy, and no more of it is of use: it makes a stop, a reload and a partition's way
    to another replica wait, and after a crash more of it may have been answered and not committed.

    Invariants: never fewer than `least`, never more than `most`. The best of the last spans counts, since a lull is no
    measure of what can be done; after a longer one, and at the start, the number grows anew, span by span.
    """

    def __init__(self, seconds: float, *, least: int, most: int) -> None:
        self._seconds = seconds
        self._least = min(least, most)
        self._most = most
        self._begun: float | None = None
        self._answered = 0
        self._rates: deque[float] = deque(maxlen=_SPANS)

    def note_answered(self, now: float, jobs: int = 1) -> bool:
        """So many more. True if `jobs` may have changed."""
        if self._begun is None:
            self._begun = now
        self._answered += jobs
        elapsed = now - self._begun
        if elapsed < _SPAN_S:
            return False
        self._rates.append(self._answered / elapsed)
        self._begun, self._answered = now, 0
        return True

    @property
    def jobs(self) -> int:
        """As things are."""
        best = max(self._rates, default=0.0)
        return min(self._most, max(self._least, round(best * self._seconds)))

    def answered_in(self, seconds: float, least: int) -> int:
        """How many are answered in so short a time, as things went of late: at the best of it they might take far longer."""
        usual = sum(self._rates) / max(1, len(self._rates))
        return min(self.jobs, max(least, round(usual * seconds)))


class PartitionRotation:
    """Lets every partition give records before one gives a second time.

    The client hands out all that it has fetched of one partition, which may be megabytes, before it looks at the next. So
    those that filled a poll are left out of the next ones, until the others have no records ready.
    """

    def __init__(self) -> None:
        self._had: set[TopicPartition] = set()

    def next(self, partitions: Collection[TopicPartition]) -> list[TopicPartition]:
        """The ones of `partitions` that are still due. Block on the poll only if all of them are."""
        self._had &= set(partitions)
        if len(self._had) == len(partitions):
            self._had.clear()
        return [partition for partition in partitions if partition not in self._had]

    def note(self, polled: Mapping[TopicPartition, Sized], limit: int, *, drained: bool = True) -> None:
        """What a poll for at most `limit` records gave; `drained`: it asked all partitions that were due."""
        if sum(map(len, polled.values())) >= limit:
            self._had |= polled.keys()
        elif drained:
            self._had.clear()  # none of those that were due has more


class PollPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn of the loop asks the client for.

    `urgent` is asked first, if there is any, and without a wait: bulk records that are ready must not come before
    interactive ones that arrived since. Only where that gives nothing, `partitions` is asked.
    """

    partitions: list[TopicPartition]
    urgent: list[TopicPartition]
    limit: int
    """Records at most."""
    complete: bool
    """All partitions that may give records are asked at once: only then the poll may wait for some to arrive."""


class PollPlanner:
    """Chooses the partitions of each poll, from what is in flight and whose turn it is.

    Invariants:
        - A partition is left out while its lane is full.
        - A poll asks for no more records than the emptiest lane takes, and for one at least.
    """

    def __init__(
        self,
        limits: InFlightLimits,
        lane_of: Mapping[str, Lane],
        *,
        max_poll_records: int,
    ) -> None:
        self._limits = limits
        self._lane_of = lane_of
        self._max_poll_records = max_poll_records
        self._rotation = PartitionRotation()

    def plan(self, readable: Collection[TopicPartition]) -> PollPlan:
        """The next poll, of those partitions that may give records."""
        # Left out and not paused: the client throws away what it has fetched of a paused partition, and a lane that is
        # full many times a second would fetch its records as often.
        pollable = [p for p in readable if not self._lane_is_full(p)]
        due = self._rotation.next(pollable)
        complete = len(due) == len(pollable)
        return PollPlan(
            partitions=due,
            urgent=[] if complete else [p for p in due if self._lane_of[p.topic] == "interactive"],
            limit=max(1, min(self._max_poll_records, self._limits.headroom())),
            complete=complete,
        )

    def note(self, plan: PollPlan, polled: Mapping[TopicPartition, Sized], *, only_urgent: bool) -> None:
        """What the plan's poll gave; `only_urgent`: the urgent partitions gave it, and no others were asked."""
        self._rotation.note(polled, plan.limit, drained=not only_urgent)

    def _lane_is_full(self, partition: TopicPartition) -> bool:
        return self._limits.is_full(self._lane_of[partition.topic])
