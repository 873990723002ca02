"""When the next micro-batch is formed: late enough for who comes meanwhile, and before the device has nothing to do. Pure."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import msgspec

QUICK_S: Final = 0.025
"""What the event loop, busy with results, may take to get to the next micro-batch: with less to do than this, a device could stand
still."""
_MOST: Final = 3
_REMEMBERED: Final = 8
"""Micro-batches whose pace is kept in mind. The fastest of them counts: a wrong guess forms the next one early, as if nothing were
known, rather than late."""


class UnderWay(msgspec.Struct, eq=False):
    """A micro-batch that is formed and not done."""

    tokens: int
    long: bool
    began: float


class PrefetchLimit:
    """How many micro-batches may be under way at once. Times are seconds of any monotonic clock.

    Invariants:
        - One runs on the device and one is formed beside it; on a device that forms them `late`, only once what is under way
          is over within `QUICK_S`. So who comes waits there for what runs, and for a whole micro-batch more only if it comes
          in that last moment.
        - A third one only while both of those take less than `QUICK_S` (late: once they are over within it), for the event loop
          may be busy for as long.
        - Nothing is formed after a text over the budget until that is done. It takes so long that the gap does not
          count, and a text that arrives meanwhile waits for at most one such text.
        - As long as no pace is known there are two, as soon as one runs.
    """

    def __init__(self, *, late: bool = False) -> None:
        self._late = late
        self._under_way: list[UnderWay] = []
        self._last_end = 0.0
        self._paces = deque[float](maxlen=_REMEMBERED)  # seconds a token

    @property
    def idle(self) -> bool:
        """Whether none is under way."""
        return not self._under_way

    def due_in(self, now: float) -> float:
        """Seconds until another one may be formed: 0 for at once, infinity for once one is done."""
        count = len(self._under_way)
        if not count:
            return 0.0
        if count >= _MOST or any(one.long for one in self._under_way):
            return math.inf
        if not self._paces:
            return 0.0 if count == 1 else math.inf
        pace = min(self._paces)
        if self._late:
            return max(0.0, self._rest(pace, now) - QUICK_S)
        quick = all(one.tokens * pace < QUICK_S for one in self._under_way)
        return 0.0 if count == 1 or quick else math.inf

    def begin(self, now: float, tokens: int, *, long: bool) -> UnderWay:
        """One of so many tokens is formed; `long`: it is a text over the budget."""
        one = UnderWay(tokens, long, now)
        self._under_way.append(one)
        return one

    def end(self, one: UnderWay, now: float, seconds: float | None) -> None:
        """It is done, for which the device took so many seconds; None if it failed, or nothing of it ran."""
        self._under_way.remove(one)
        self._last_end = now
        if seconds is not None:
            self._paces.append(seconds / max(1, one.tokens))

    def _rest(self, pace: float, now: float) -> float:
        """Seconds until all that is under way is done. The first of them runs, since it was formed or since the one before it was
        done."""
        running, *waiting = self._under_way
        since = max(running.began, self._last_end)
        return max(0.0, since + running.tokens * pace - now) + pace * sum(one.tokens for one in waiting)
