"""How long each step of a load took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LoadTimer"]


class LoadTimer:
    """Seconds of each step, in order; a step that occurs twice is added up.

    `wait` is called at the end of each step, to let the device finish what the step started.
    """

    def __init__(
        self, wait: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = wait
        self._clock = clock

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block; one that raises is not counted."""
        begin = self._clock()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - begin
