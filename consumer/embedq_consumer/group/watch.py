"""Watches the watermarks: says which one is stuck, and gives up its record in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from embedq_consumer.group.offsets import OffsetLedger, Ticket
from embedq_consumer.group.watermark import Lowest, Overtaken, Watermarks
from embedq_consumer.telemetry.metrics import Metrics

log = structlog.get_logger()

_LOOK_S: Final = 1.0
"""Often enough for bounds of minutes."""
_LOOKS_A_BOUND: Final = 4

Times = Callable[[Ticket], tuple[float, float]]
"""When a record was polled, and when the newest answered one of its lane was."""


class WatermarkWatch:
    """Looks again and again, and gives up each record once at most."""

    def __init__(
        self, ledger: OffsetLedger, times: Times, metrics: Metrics, *, stuck_after_s: float, limit_s: float
    ) -> None:
        self._ledger = ledger
        self._times = times
        self._metrics = metrics
        self._stuck_after_s = stuck_after_s
        self._limit_s = limit_s
        self._watermarks = Watermarks()
        self._given_up: set[Ticket] = set()

    async def run(
        self, give_up: Callable[[Ticket, Overtaken], None], tell: Callable[[str | None], None]
    ) -> None:
        """`tell` hears why the service is not ready, or None; `give_up` gets what nobody should wait for any longer."""
        while True:
            overtaken = self._look(time.monotonic())
            self._give_up(overtaken, give_up)
            stuck = [its for its in overtaken if its.seconds >= self._stuck_after_s]
            tell(_reason(stuck[0]) if stuck else None)
            await asyncio.sleep(min(_LOOK_S, self._stuck_after_s / _LOOKS_A_BOUND))

    def _look(self, now: float) -> list[Overtaken]:
        """Longest first."""
        lowest = {}
        for ticket in self._first_unfinished():
            polled_at, newest_answered = self._times(ticket)
            lowest[ticket.partition] = Lowest(ticket.offset, polled_at), newest_answered
        found = sorted(self._watermarks.look(now, lowest).values(), key=lambda its: -its.seconds)
        self._metrics.overtaken.set(found[0].seconds if found else 0.0)
        return found

    def _give_up(self, overtaken: Iterable[Overtaken], give_up: Callable[[Ticket, Overtaken], None]) -> None:
        self._given_up &= set(self._first_unfinished())
        for its in overtaken:
            ticket = self._ledger.lowest(its.partition)
            if its.seconds < self._limit_s or ticket is None or ticket in self._given_up:
                continue
            self._given_up.add(ticket)
            log.error(
                "record_given_up",
                topic=its.partition.topic,
                partition=its.partition.partition,
                offset=its.offset,
            )
            give_up(ticket, its)

    def _first_unfinished(self) -> Iterable[Ticket]:
        found = (self._ledger.lowest(partition) for partition in self._ledger.partitions)
        return (ticket for ticket in found if ticket is not None)


def _reason(its: Overtaken) -> str:
    """One line for the readiness page."""
    return (
        f"{its.partition.topic}-{its.partition.partition} is stuck at offset {its.offset}: "
        f"later jobs have been answered for {its.seconds:.0f} s"
    )
