"""What the next poll may read: back-pressure and fairness between partitions. Pure, one owner (the intake)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sized
from typing import Final

import msgspec

from embedq_consumer.intake.offsets import OffsetLedger
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import LANES, Lane

_RESUME_AT: Final = 0.5
"""A full lane takes records again once this share is left: then whole polls, and not one record for each result."""
_RESUME_JOBS: Final = 1024
"""So many free places are enough in any case: two polls. Half of a large lane would come in one long burst."""


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

    def remove(self, lane: Lane, size: int) -> bool:
        """It is answered. True if the lane has just stopped being full."""
        self._jobs[lane] -= 1
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
        ledger: OffsetLedger,
        limits: InFlightLimits,
        lane_of: Mapping[str, Lane],
        *,
        max_poll_records: int,
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._lane_of = lane_of
        self._max_poll_records = max_poll_records
        self._rotation = PartitionRotation()

    def plan(self, *, held: bool) -> PollPlan:
        """The next poll. `held`: no partition may give records."""
        assigned = self._ledger.partitions
        # Left out and not paused: the client throws away what it has fetched of a paused partition, and a lane that is
        # full many times a second would fetch its records as often.
        pollable = [] if held else [p for p in assigned if not self._lane_is_full(p)]
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

    def may_read_on(self, partition: TopicPartition) -> bool:
        """Whether one more record of this partition fits its lane."""
        return not self._lane_is_full(partition)

    def _lane_is_full(self, partition: TopicPartition) -> bool:
        return self._limits.is_full(self._lane_of[partition.topic])
