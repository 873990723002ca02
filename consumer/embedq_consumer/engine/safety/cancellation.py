"""Work that somebody may stop wanting. No thread can be ended from outside, so the work looks at a flag between its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Abandoned", "Cancellation"]


class Abandoned(Exception):
    """Nobody wants what this work would have given."""


class Cancellation:
    """One flag, which any thread may set and look at. Once set, it stays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._stops: list[Callable[[], object]] = []

    @property
    def is_set(self) -> bool:
        """Whether the work is not wanted any more."""
        return self._is_set

    def set(self) -> None:
        """Stop the work at its next look, and what `stopping` names at once, from this thread."""
        with self._lock:
            self._is_set = True
            stops, self._stops = self._stops, []
        for stop in stops:
            stop()

    def check(self) -> None:
        """
        Raises:
            Abandoned: the work is not wanted any more.
        """
        if self._is_set:
            raise Abandoned

    @contextmanager
    def stopping(self, stop: Callable[[], object]) -> Iterator[None]:
        """Call `stop` if the flag is set while the block runs, or was before: for what waits and cannot look at it."""
        with self._lock:
            was_set = self._is_set
            if not was_set:
                self._stops.append(stop)
        if was_set:
            stop()
        try:
            yield
        finally:
            with self._lock:
                if stop in self._stops:
                    self._stops.remove(stop)
