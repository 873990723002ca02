"""Starts parked records, as soon as they may start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final, Generic

from embedq_consumer.fairness.parking import Parking, RecordT

_STARTS: Final = 512
"""Records that are started in one turn of the event loop, as many as a poll brings: decoding them takes some milliseconds."""


class Starter(Generic[RecordT]):
    """Hands parked records over to `take`, which draws them: each is started when it is drawn, and weighed before the next.

    Nothing starts before `begin`, nor while `may_start` says no.
    """

    def __init__(self, parking: Parking[RecordT], may_start: Callable[[], bool]) -> None:
        self._parking = parking
        self._may_start = may_start
        self._take: Callable[[Iterable[RecordT]], None] | None = None
        self._is_due = False

    def begin(self, take: Callable[[Iterable[RecordT]], None]) -> None:
        """From now on records go to `take`."""
        self._take = take

    def soon(self) -> None:
        """Something that parked records wait for may have come true."""
        if self._parking and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self.now)

    def now(self) -> None:
        """Start what may be started; after `_STARTS` records other work has its turn."""
        self._is_due = False
        if self._take is not None and self._parking and self._may_start():
            records = self._drawn()
            if (first := next(records, None)) is not None:
                self._take(chain([first], records))

    def _drawn(self) -> Iterator[RecordT]:
        if (yield from self._parking.draw(_STARTS)) == _STARTS:
            self.soon()
