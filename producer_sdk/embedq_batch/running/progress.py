"""How far a run is, in words."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

_EVERY_S: Final = 60.0
"""Between lines where no terminal is: a day's log has 1,440."""


class Progress:
    """Counts of a run, and what is said of them. Time is an argument."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.total: int | None = None
        """Rows of the source, if it knows."""
        self.read = 0
        """Rows of the present pass."""
        self.skipped = 0
        """Rows of the present pass that were done before."""
        self.embedded = 0
        self.failed = 0
        self.deleted = 0
        self.tokens = 0
        self.cached = 0
        self.device_s = 0.0
        """Seconds of the service's device, that of a GPU where it has one, as far as it says."""
        self.waiting: str | None = None
        """Why nothing comes."""
        self.round = "rows"

    def begin(self, what: str) -> None:
        """A pass over the source begins."""
        self.read = self.skipped = 0
        self.round = what

    @property
    def finished(self) -> int:
        """Rows that this process has dealt with."""
        return self.embedded + self.failed

    def rate(self, now: float) -> float:
        """Rows a second."""
        return self.finished / max(now - self.started, 1e-9)

    def seconds_left(self, now: float) -> float | None:
        """If that can be known."""
        rate = self.rate(now)
        if self.total is None or rate <= 0:
            return None
        return max(0.0, (self.total - self.skipped - self.finished) / rate)

    def line(self, now: float) -> str:
        """All of it in one line."""
        spent = max(now - self.started, 1e-9)
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.skipped + self.finished:,}{of} {self.round}", f"{self.rate(now):,.0f} rows/s"]
        parts.append(f"{self.tokens / spent:,.0f} tokens/s")
        if self.embedded:
            parts.append(f"{self.cached / self.embedded:.0%} from the cache")
        if self.device_s:
            parts.append(f"{self.device_s:,.1f} s of the device")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        left = self.seconds_left(now)
        if self.waiting is not None:
            parts.append(f"waiting: {self.waiting}")
        elif left is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@contextlib.asynccontextmanager
async def reported(
    progress: Progress, report: Callable[[str], None], every: float = _EVERY_S
) -> AsyncIterator[None]:
    """Give `report` a line every so many seconds."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(every)
            report(progress.line(time.monotonic()))

    task = asyncio.create_task(repeat(), name="embedq-run-progress")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
