"""How much may be in flight. Pure, one owner (the intake)."""

from __future__ import annotations

from typing import Final

from embedq_shared.topics import LANES, Lane

_RESUME_AT: Final = 0.5
"""A full lane takes records again once this share is left: then whole polls, and not one record for each answer."""


class InFlightLimits:
    """Counts jobs and bytes of each lane, and says which lanes are full.

    Invariants: every `take` has one `release`; with nothing in flight all counts are zero and no lane is full.
    """

    def __init__(self, *, max_jobs: int, max_bytes: int) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._bytes: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._full: dict[Lane, bool] = dict.fromkeys(LANES, False)

    def take(self, lane: Lane, size: int) -> None:
        """A job of `size` bytes is in flight."""
        self._jobs[lane] += 1
        self._bytes[lane] += size
        if self._jobs[lane] >= self._max_jobs or self._bytes[lane] >= self._max_bytes:
            self._full[lane] = True

    def release(self, lane: Lane, size: int) -> bool:
        """It is answered. True if the lane has just stopped being full."""
        self._jobs[lane] -= 1
        self._bytes[lane] -= size
        if self._jobs[lane] < 0 or self._bytes[lane] < 0:
            raise RuntimeError("more was released than taken. This is a bug.")
        if not self._full[lane]:
            return False
        room = (
            self._jobs[lane] <= self._max_jobs * _RESUME_AT
            and self._bytes[lane] <= self._max_bytes * _RESUME_AT
        )
        self._full[lane] = not room
        return room

    def is_full(self, lane: Lane) -> bool:
        """Whether the lane's partitions should give no records."""
        return self._full[lane]

    def room(self) -> int:
        """How many jobs the emptiest lane that is not full still takes."""
        return max((self._max_jobs - self._jobs[lane] for lane in LANES if not self._full[lane]), default=0)

    def jobs(self, lane: Lane) -> int:
        """Jobs in flight."""
        return self._jobs[lane]

    def bytes(self, lane: Lane) -> int:
        """Bytes in flight."""
        return self._bytes[lane]

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not any(self._jobs.values())
