"""The process leaves, whatever still hangs in it: a drain that does not end, a device that does not answer, a lost disk."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

import structlog

from embedq_consumer.threads import left_behind

__all__ = ["FORCED", "ExitDeadline", "leave"]

FORCED: Final = 1
"""The exit code of a process that had to be ended by force."""
_LAST_S: Final = 3.0
"""What the forced end itself has, to log and to flush. Then the interpreter is not asked any more."""

log = structlog.get_logger()


def leave(code: int) -> NoReturn:
    """End the process with this exit code: orderly if it can, at once if a thread is left that would be waited for or crash."""
    if stuck := left_behind():
        log.warning("threads_left_behind", threads=sorted(stuck))
        _flush()
        os._exit(code)
    sys.exit(code)


class ExitDeadline:
    """By when the process is to have ended. Any thread may call it.

    Two watch over it. A thread, which logs what was waited for. And, should that not come to run, because native code keeps the
    interpreter's lock or nobody reads our log, faulthandler's own timer, which needs neither.

    Invariant: the deadline never moves back.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[], object] | None = None,
    ) -> None:
        self._clock = clock
        self._end = end or _end_by_force
        self._last_resort = end is None
        self._changed = threading.Condition()
        self._at: float | None = None
        self._nowhere: int | None = None

    def arm(self, within_s: float) -> None:
        """The process is leaving, and has this many seconds for it; less if it had less already."""
        with self._changed:
            at = self._clock() + within_s
            if self._at is not None:
                at = min(at, self._at)
            else:
                threading.Thread(target=self._watch, name="exit-deadline", daemon=True).start()
            self._at = at
            self._changed.notify_all()
        if self._last_resort:
            # Its report would go to stderr, which may be a pipe that nobody reads.
            self._nowhere = self._nowhere or os.open(os.devnull, os.O_WRONLY)
            left_s = max(0.0, at - self._clock()) + _LAST_S
            faulthandler.dump_traceback_later(left_s, exit=True, file=self._nowhere)

    def _watch(self) -> None:
        with self._changed:
            while self._at is not None and (left := self._at - self._clock()) > 0:
                self._changed.wait(left)
        self._end()


def _end_by_force() -> NoReturn:
    waited_for = sorted(
        thread.name for thread in threading.enumerate() if thread is not threading.current_thread()
    )
    try:
        log.error("exit_forced", threads=waited_for, code=FORCED)
        with suppress(OSError, ValueError, RuntimeError):  # stderr may be closed
            faulthandler.dump_traceback(sys.stderr)
        _flush()
    finally:
        os._exit(FORCED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
