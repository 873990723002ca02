"""The steps of a load: how long each took, and whether the next one is still wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedq_consumer.engine.safety.cancellation import Cancellation

__all__ = ["LoadTimer"]


class LoadTimer:
    """Seconds of each step, in order; a step that occurs twice is added up.

    `wait` is called at the end of each step, to let the device finish what the step started. `cancel` is looked at before each.
    """

    def __init__(
        self,
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        cancel: Cancellation | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = wait
        self._clock = clock
        self._cancel = cancel or Cancellation()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block; one that raises is not counted.

        Raises:
            Abandoned: before the block, if the load is not wanted any more.
        """
        self._cancel.check()
        begin = self._clock()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - begin
