"""For how long nobody was heard. Pure: time is an argument."""

from __future__ import annotations


class Silence:
    """Adds up the time in which we listened and nothing came.

    Whoever does not listen hears nothing, and that is nobody else's silence: an event loop that stands still, because the
    processor is somebody else's or a caller's code blocks it, finds all that came meanwhile only when it goes on. So the time
    from one look to the next counts up to `turn_s`, which is more than a turn of a loop that runs needs. Seconds of a clock
    that only rises.
    """

    def __init__(self, turn_s: float) -> None:
        self._turn_s = turn_s
        self._quiet = 0.0
        self._heard: object = None
        self._looked: float | None = None

    def listen(self, now: float) -> None:
        """We listen from now on, and did something else since the last look, which counts for nothing."""
        self._looked = now

    def look(self, heard: object, now: float) -> float:
        """Seconds of silence by now, from `listen` or the first look on. `heard` is another value than before whenever something
        came, and None before."""
        if heard != self._heard:
            self._quiet = 0.0
        else:
            self._quiet = self.at(now)
        self._heard, self._looked = heard, now
        return self._quiet

    def at(self, now: float) -> float:
        """Seconds of silence by now, between two looks; none before the first one."""
        return 0.0 if self._looked is None else self._quiet + min(now - self._looked, self._turn_s)
