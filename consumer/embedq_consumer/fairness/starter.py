"""Starts parked records, as soon as they may start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final, Generic

from embedq_consumer.fairness.bulk_turns import BulkTurns
from embedq_consumer.fairness.parking import Parking, RecordT
from embedq_shared.topics import LANES, Lane

_STARTS: Final = 512
"""Records that are started in one turn of the event loop, as many as a poll brings: decoding them takes some milliseconds."""
_STARTS_BESIDE: Final = 64
"""Bulk records that are started at a time while interactive ones come: a millisecond or two."""


class Starter(Generic[RecordT]):
    """Hands parked records over to `take`, which draws them: each is started when it is drawn, and weighed before the next.

    Nothing starts before `begin`, nor while `may_start` says no. While interactive records come, they start by themselves,
    and bulk ones in bulk's turns.
    """

    def __init__(
        self, parking: Parking[RecordT], may_start: Callable[[], bool], bulk_turns: BulkTurns
    ) -> None:
        self._parking = parking
        self._may_start = may_start
        self._bulk_turns = bulk_turns
        self._take: Callable[[Iterable[RecordT]], None] | None = None
        self._is_due = False
        self._bulk_is_due = False

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
        if not self._bulk_turns.needed:
            self._start(LANES, _STARTS)
            return
        self._start(("interactive",), _STARTS)
        if self._parking.parked("bulk") and not self._bulk_is_due:
            self._bulk_is_due = True
            self._bulk_turns.soon(self._start_bulk)

    def _start_bulk(self) -> None:
        self._bulk_is_due = False
        self._start(("bulk",), _STARTS_BESIDE)

    def _start(self, lanes: Iterable[Lane], most: int) -> None:
        if self._take is not None and self._parking and self._may_start():
            records = self._drawn(lanes, most)
            if (first := next(records, None)) is not None:
                self._take(chain([first], records))

    def _drawn(self, lanes: Iterable[Lane], most: int) -> Iterator[RecordT]:
        if (yield from self._parking.draw(most, lanes)) == most:
            self.soon()
