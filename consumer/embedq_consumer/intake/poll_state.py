"""What the poll loop may do now. Pure: events in, decisions out; no clock, no I/O, one owner (the intake)."""

from __future__ import annotations

from typing import Literal

Phase = Literal["running", "held", "draining", "stopped"]
"""From normal work to the end; where several are true, the later one counts.

- running: polls give records.
- held: there are no polls, so that a model can be swapped.
- draining: `stop` was asked for; a last poll may still hand over its records.
- stopped: the poll loop has ended.
"""

Turn = Literal["poll", "rest", "end"]
"""What the loop does in one turn."""


class PollState:
    """Knows which holds and stop are under way, and what the loop does in its present turn.

    Rebalances are none of its business: partitions change between two turns, and reading goes on.

    Invariants:
        - While there is a hold, no turn gives records. The hold is reached once the turn before it is over.
        - After `stop` no turn begins but `end`.
        - Whatever changes what may be polled interrupts the turn under way: see `interrupted`.
    """

    def __init__(self) -> None:
        self._holds = 0
        self._stopping = False
        self._turn: Turn | None = None
        self._interrupted = False

    # -- what happens -------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """No more records until as many `release`."""
        self._holds += 1
        self._interrupted = True

    def release(self) -> None:
        """One hold is over."""
        if not self._holds:
            raise RuntimeError("a hold was released that was never taken. This is a bug.")
        self._holds -= 1
        self._interrupted = True

    def stop(self) -> None:
        """Take nothing more, for good."""
        self._stopping = True
        self._interrupted = True

    def interrupt(self) -> None:
        """Other partitions may give records than those that the turn under way asked."""
        self._interrupted = True

    def next_turn(self) -> Turn:
        """The turn before is over, and this one begins."""
        self._interrupted = False
        self._turn = self.due
        return self._turn

    # -- what follows from it -----------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """All of it in one word."""
        if self.ended:
            return "stopped"
        if self._stopping:
            return "draining"
        return "held" if self._holds else "running"

    @property
    def due(self) -> Turn:
        """What the next turn would be if it began now."""
        match self.phase:
            case "running":
                return "poll"
            case "held":
                return "rest"
            case "draining" | "stopped":
                return "end"

    @property
    def interrupted(self) -> bool:
        """Whether the turn under way should end now."""
        return self._interrupted

    @property
    def hold_reached(self) -> bool:
        """Whether no record can come in any more: a poll from before the hold has handed over its records."""
        return self._holds > 0 and self._turn != "poll"

    @property
    def ended(self) -> bool:
        """Whether the loop has taken its last record."""
        return self._turn == "end"
