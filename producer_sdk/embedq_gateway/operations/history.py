"""Lag and throughput of the last minutes. Pure: time is an argument, in epoch seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec

from embedq_shared.topics import Lane

SAMPLE_S: Final = 5.0
"""Between two samples."""
KEPT_S: Final = 600.0
"""What is kept, and what the console draws."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One sample: what waited then, and what was answered since the one before."""

    at: float
    lag: dict[Lane, int] | None
    """Jobs by lane; None: Kafka did not say."""
    tokens_per_s: float
    """Of all workers of this gateway, not of other clients of the service."""


class History:
    """The points of the last minutes, oldest first."""

    def __init__(self, kept_s: float = KEPT_S) -> None:
        self._kept_s = kept_s
        self._points: deque[Point] = deque()
        self._last: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._points)

    def add(self, at: float, lag: Mapping[Lane, int] | None, tokens: float) -> None:
        """A sample; `tokens` is what was counted so far. The first one only begins the count."""
        if self._last is not None:
            before, counted = self._last
            if at <= before:
                return  # the clock was set back
            # A worker that was restarted counts from zero again.
            rate = max(0.0, tokens - counted) / (at - before)
            self._points.append(
                Point(at=at, lag=None if lag is None else dict(lag), tokens_per_s=round(rate, 1))
            )
        self._last = (at, tokens)
        while self._points and at - self._points[0].at > self._kept_s:
            self._points.popleft()

    def points(self) -> list[Point]:
        """All that are kept."""
        return list(self._points)
