"""Who runs which batch: whose lease is over, and whose turn is next. Nothing here does I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from embedq_gateway.batches.batch import Batch, Lease


class LeaseWatch:
    """Finds out that a holder gives no sign of life any more, without comparing the clocks of two machines.

    A lease is over once this process has seen the same beat of it for `after_s` seconds of its own monotonic clock. So a
    gateway that has just started waits that long before it takes what another one, or an earlier life of its own, held.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._seen: dict[str, tuple[Lease, float]] = {}

    def free(self, batch: Batch, now: float) -> bool:
        """Whether the batch may be taken, as it was seen now."""
        if batch.lease is None:
            self._seen.pop(batch.id, None)
            return True
        lease, since = self._seen.get(batch.id, (None, now))
        if lease != batch.lease:
            self._seen[batch.id] = (batch.lease, now)
            return False
        return now - since >= self._after_s

    def forget_others(self, batches: Iterable[str]) -> None:
        """Remember these alone: the others have ended."""
        known = set(batches)
        self._seen = {name: seen for name, seen in self._seen.items() if name in known}


def next_batch(waiting: Iterable[Batch], running: Iterable[Batch]) -> Batch | None:
    """Whose turn it is: of the owner who has the fewest running here, the oldest. So a hundred batches delay nobody else's first."""
    busy = Counter(batch.owner for batch in running)
    return min(waiting, key=lambda batch: (busy[batch.owner], batch.id), default=None)
