"""How long a peer may take for what it sends and reads, and how much of a head it may send. Pure: time is an argument."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Phase = Literal["idle", "head", "body", "answer", "rest"]

_REST_S: Final = 5.0
"""For the rest of a body that was refused. It is read and forgotten, since a peer that is cut off while it sends may lose the answer."""
_STUCK_S: Final = 30.0
"""For taking some of an answer that waits to be sent."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What one process puts up with."""

    connections: int
    """Open ones. One more makes the one that has been idle for longest give way."""
    head_bytes: int
    """Of a request's line and headers."""
    head_s: float
    """From a head's first byte to its end."""
    idle_s: float
    """Before a request begins."""
    body_bytes_per_s: int
    """The least speed at which a body must come, on average and after as long as a head may take."""


class Late(msgspec.Struct, frozen=True):
    """A connection to be closed: why, and whether it should be told, if it was not answered already."""

    tell: bool
    why: str


class Pace:
    """One connection: what is awaited of the peer, since when (monotonic seconds), and how much has come of it.

    idle → head → body → answer → idle; where the answer came before the end of the body: body → rest → idle. Requests that are sent
    ahead, during an answer, are a part of its phase.
    """

    __slots__ = ("_bounds", "_bytes", "_since", "_stuck_since", "phase")

    def __init__(self, bounds: Bounds, now: float) -> None:
        self._bounds = bounds
        self._since = now
        self._bytes = 0
        self._stuck_since: float | None = None
        self.phase: Phase = "idle"

    def received(self, size: int, now: float) -> None:
        """Bytes came; called before anything is made of them."""
        if self.phase == "idle":
            self._enter("head", now)
        self._bytes += size

    def head_ended(self, now: float) -> None:
        """The headers are there."""
        if self.phase in ("idle", "head"):
            self._enter("body", now)

    def body_ended(self, now: float) -> None:
        """The whole request is there."""
        if self.phase == "body":
            self._enter("answer", now)
        elif self.phase == "rest":
            self._enter("idle", now)

    def answered(self, now: float, *, next_one: bool = False) -> None:
        """The answer is written, and the next one is begun if its request was sent ahead."""
        self._enter("rest" if self.phase == "body" else "answer" if next_one else "idle", now)

    def refused(self, now: float) -> None:
        """The peer was answered before it had sent all, and will get no other answer."""
        self._enter("rest", now)

    def stuck(self, now: float) -> None:
        """The peer does not take what is written, so no more is."""
        self._stuck_since = now

    def flows(self) -> None:
        """It does again."""
        self._stuck_since = None

    @property
    def short_enough_a_head(self) -> bool:
        """Whether a head that ends now has the right size for certain, since no more than that has come in all."""
        return self.phase == "head" and self._bytes <= self._bounds.head_bytes

    @property
    def too_long_a_head(self) -> bool:
        """Whether more has come of a head than one may have, and it has not ended yet."""
        return self.phase == "head" and self._bytes > self._bounds.head_bytes

    def late(self, now: float) -> Late | None:
        """Whether the peer has taken too long."""
        bounds, passed = self._bounds, now - self._since
        if self._stuck_since is not None and now - self._stuck_since > _STUCK_S:
            return Late(False, "its answer is not taken")
        match self.phase:
            case "idle" if passed > bounds.idle_s:
                return Late(False, "idle")
            case "head" if passed > bounds.head_s:
                return Late(True, f"expected the head of a request within {bounds.head_s:g} s")
            case "body" if passed > bounds.head_s + self._bytes / bounds.body_bytes_per_s:
                return Late(True, f"expected a body of at least {bounds.body_bytes_per_s:,} bytes a second")
            case "rest" if passed > _REST_S:
                return Late(False, "the rest of a refused body")
            case _:
                return None

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self._since = now
        self._bytes = 0
