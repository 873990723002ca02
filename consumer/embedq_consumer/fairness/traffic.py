"""Whether interactive work came lately: as long as it does, bulk work goes in small pieces. Pure."""

from __future__ import annotations

import math
from typing import Final

LATELY_S: Final = 30.0
"""Whoever comes more often than this never meets bulk work in large pieces. Longer, and a single interactive job would cost
bulk its throughput for minutes; shorter, and a client that asks now and then would always be the first again."""


class InteractiveTraffic:
    """When interactive work came last. Times are seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._last = -math.inf

    def note(self, now: float) -> None:
        """Some has come."""
        self._last = now

    def lately(self, now: float) -> bool:
        """Whether some came within `LATELY_S`."""
        return now - self._last < LATELY_S
