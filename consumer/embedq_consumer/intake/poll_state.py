"""What the poll loop may do now. Pure: events in, decisions out; no clock, no I/O, one owner (the intake)."""

from __future__ import annotations

from typing import Literal

Phase = Literal["running", "held", "revoking", "reassigning", "draining", "stopped"]
"""From normal work to the end; where several are true, the later one counts.

- running: polls give records.
- held: polls give none, so that a model can be swapped while the group membership goes on.
- revoking: a rebalance has begun and the partitions are still ours; what is in flight is finished and committed.
- reassigning: the partitions are given up and the new ones are not known yet.
- draining: `stop` was asked for; a last poll may still hand over its records.
- stopped: the poll loop has ended.
"""

Turn = Literal["poll", "poll_nothing", "wait", "end"]
"""What the loop does in one turn. `poll_nothing`: no partition may give records, but without polls the
replica would lose its place in the group."""


class PollState:
    """Knows which holds, rebalance and stop are under way, and what the loop does in its present turn.

    Invariants:
        - From `revoke` to `assign` no turn polls, so every record belongs to the epoch in which it was polled.
        - While there is a hold, no turn gives records. The hold is reached once the turn before it is over.
        - After `stop` no turn begins but `end`, not even during a rebalance.
        - Whatever changes what may be polled interrupts the poll under way: see `interrupted`.
        - No commit between `give_up` and `assign`, not even a last one: the broker checks the member's generation and not whose
          partition it is, so a late commit would set back partitions that another replica has read on.
    """

    def __init__(self) -> None:
        self._holds = 0
        self._rebalance: Literal["none", "revoking", "reassigning"] = "none"
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

    def revoke(self) -> None:
        """A rebalance begins."""
        self._rebalance = "revoking"
        self._interrupted = True

    def give_up(self) -> None:
        """The partitions are no longer ours, as soon as the client goes on with the rebalance."""
        if not self.parked:
            raise RuntimeError("partitions were given up during a poll. This is a bug.")
        self._rebalance = "reassigning"

    def assign(self) -> None:
        """The rebalance is over."""
        self._rebalance = "none"

    def stop(self) -> None:
        """Take nothing more, for good."""
        self._stopping = True
        self._interrupted = True

    def interrupt(self) -> None:
        """A partition that was left out may give records again: the poll under way has asked for too few."""
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
        if self._rebalance != "none":
            return self._rebalance
        return "held" if self._holds else "running"

    @property
    def due(self) -> Turn:
        """What the next turn would be if it began now."""
        match self.phase:
            case "running":
                return "poll"
            case "held":
                return "poll_nothing"
            case "revoking" | "reassigning":
                return "wait"
            case "draining" | "stopped":
                return "end"

    @property
    def interrupted(self) -> bool:
        """Whether the poll under way should end now.

        It must for a rebalance: the client lets no poll return before the new assignment is there, and the rebalance
        listener returns only after the poll.
        """
        return self._interrupted

    @property
    def parked(self) -> bool:
        """Whether no poll runs, and none begins before the present phase ends."""
        return self._turn not in ("poll", "poll_nothing")

    @property
    def hold_reached(self) -> bool:
        """Whether no record can come in any more: a poll from before the hold has handed over its records."""
        return self._holds > 0 and self._turn != "poll"

    @property
    def ended(self) -> bool:
        """Whether the loop has taken its last record."""
        return self._turn == "end"

    @property
    def may_commit(self) -> bool:
        """Whether the partitions are ours, so that a commit cannot set another replica back."""
        return self._rebalance != "reassigning"

    @property
    def rebalancing(self) -> bool:
        """Whether a rebalance is under way."""
        return self._rebalance != "none"
