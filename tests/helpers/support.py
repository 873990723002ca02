"""Small helpers for tests. Nothing here knows what is under test."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

BUSY: Final = 2.0
"""Programs that want to run, for each core, up to which the limits of the tests hold as they are written.

Two workers with a broker and a few replicas each come to about that; beyond it, other work slows the machine down.
"""

LONGEST: Final = 10.0
"""The most that a limit is multiplied by: a test that truly hangs must still end within CI's time."""

_FIRST_PAUSE_S: Final = 0.001
_SHORT_PAUSE_S: Final = 0.02
_LAST_PAUSE_S: Final = 0.1
_PAUSE: Final = 0.1
"""A wait asks again after this part of the time that it has waited, between the two: who waits for seconds for a process to start
would else take from it, with fifty questions in each, the processor that it starts on. What comes within the test's own process is
mostly there at once: a wait begins with shorter pauses, each half of what it has waited."""


def patience() -> float:
    """What a limit is multiplied by: 1 on a quiet machine, more on a busy one, up to LONGEST.

    It follows the load as it is now, so that a limit holds, too, where the load came later. EMBEDQ_TEST_PATIENCE
    replaces the measured value. A limit that only a failing test reaches costs nothing by being long.
    """
    if chosen := os.environ.get("EMBEDQ_TEST_PATIENCE"):
        return float(chosen)
    return min(LONGEST, max(1.0, os.getloadavg()[0] / (_cores() * BUSY)))


def patient(seconds: float) -> float:
    """A limit of a quiet machine, in seconds of this machine as it is now.

    Every limit of a test that a starved processor could break goes through here: deadlines, subprocess timeouts, and
    the upper bound of a duration that a test asserts.
    """
    return seconds * patience()


async def wait_until(
    ready: Callable[[], bool | Awaitable[bool]],
    *,
    within: float = 30.0,
    what: str = "the condition",
    longest_pause: float = _LAST_PAUSE_S,
) -> None:
    """Wait for a condition instead of a duration; `what` names it when it never comes.

    `within` is in seconds of a quiet machine. `longest_pause`: seconds between two questions, at most.
    """
    started = time.monotonic()
    while True:
        # Asked again at the end of the time: the load may have come after the beginning.
        limit = started + patient(within) - time.monotonic()
        if limit <= 0:
            raise AssertionError(f"{what} did not come true within {time.monotonic() - started:.0f} s")
        try:
            async with asyncio.timeout(limit):
                while True:
                    answer = ready()
                    if await answer if isinstance(answer, Awaitable) else answer:
                        return
                    await asyncio.sleep(min(_pause(started), longest_pause))
        except TimeoutError:
            continue


def wait_for(ready: Callable[[], bool], *, within: float = 30.0, what: str = "the condition") -> None:
    """Wait for a condition where no event loop runs. `within` is in seconds of a quiet machine."""
    started = time.monotonic()
    while not ready():
        waited = time.monotonic() - started
        assert waited < patient(within), f"{what} did not come true within {waited:.0f} s"
        time.sleep(_pause(started))


def _pause(started: float) -> float:
    """Until the next question of a wait that began then."""
    waited = time.monotonic() - started
    return min(_LAST_PAUSE_S, max(_FIRST_PAUSE_S, min(waited / 2, _SHORT_PAUSE_S), _PAUSE * waited))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
