"""How long the vectors are that jobs ask for: a model with a smaller hidden size would refuse those jobs."""

from __future__ import annotations

from typing import Final

from embedq_consumer.lifecycle.gates.checks import ModelRejected

__all__ = ["DimensionsInUse", "check_dimensions"]

_KEPT_S: Final = 3600.0
"""A client that has not asked for so many dimensions within an hour asks for fewer now, or is gone."""


class DimensionsInUse:
    """The most `dimensions` that a job named within the last hour. Times are monotonic seconds.

    Those asked for last, and before them only more: what is smaller and older can never be the most again.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[int, float]] = []

    def note(self, dimensions: int, now: float) -> None:
        """A job asks for these."""
        while self._asked and self._asked[-1][0] <= dimensions:
            self._asked.pop()
        self._asked.append((dimensions, now))

    def most(self, now: float) -> int:
        """0 where no job has named any."""
        self._asked = [(dimensions, at) for dimensions, at in self._asked if now - at <= _KEPT_S]
        return self._asked[0][0] if self._asked else 0


def check_dimensions(hidden_size: int | None, least: int | None, in_use: int) -> None:
    """A model's vectors are long enough for the command, or else for the jobs of the last hour. None: not known yet, not asked.

    Raises:
        ModelRejected: they are not.
    """
    if hidden_size is None:
        return
    if least is not None and hidden_size < least:
        raise ModelRejected(f"min_dimensions: expected a hidden size of at least {least}, got {hidden_size}")
    if least is None and hidden_size < in_use:
        raise ModelRejected(
            f"dimensions: jobs of the last hour asked for {in_use}, the model's hidden size is {hidden_size}; "
            "`min_dimensions` in the command says that fewer will do"
        )
