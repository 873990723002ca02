"""Equal texts under way are computed once. Pure, one owner (the pipeline)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from embedq_consumer.batching.windows import Vectors, WindowAssembler
from embedq_consumer.engine import Chunked, Encoder, Text, Tokens
from embedq_consumer.intake.jobs import JobState
from embedq_shared.topics import Lane

Waiter = tuple[JobState, int]
"""One input of a job."""


class Identity(msgspec.Struct, frozen=True, gc=False):
    """Deduplication key: what the model sees of an input, and which model. The lane belongs to it, so that no interactive
    text waits for a bulk one; the encoder, since windows of a job that expired may still wait for a micro-batch when
    another model serves. Dimensions and dtype do not: each waiter cuts its own vector.
    """

    lane: Lane
    text: Text
    encoder: Encoder

    @classmethod
    def of(cls, job: JobState, index: int) -> Identity:
        """The identity of one input."""
        return cls(job.record.lane, job.request.text(index), job.encoder)


class Window(msgspec.Struct, frozen=True, gc=False):
    """Which window of a chunked text."""

    of: Chunked
    number: int


class Item(msgspec.Struct, frozen=True, gc=False):
    """One text, or one window of it, that waits for a micro-batch. `arrived` is monotonic seconds."""

    identity: Identity
    text: Tokens
    arrived: float
    window: Window | None = None

    @property
    def cost(self) -> int:
        """Its share of the token budget."""
        return self.text.cost

    @property
    def lane(self) -> Lane:
        """Which queue it waits in."""
        return self.identity.lane


class SingleFlight:
    """Who waits for which text's vector.

    Invariants: of equal inputs the first to join starts the work and no other does; whoever joined is handed out
    exactly once, by `leave` or by `land`; windows are kept only while somebody waits for their text.
    """

    def __init__(self) -> None:
        self._waiting: dict[Identity, list[Waiter]] = {}
        self._gathered: dict[Identity, WindowAssembler] = {}

    def join(self, identity: Identity, waiter: Waiter) -> bool:
        """Wait for this text's vector. True for the first, who must see to it."""
        waiting = self._waiting.get(identity)
        if waiting is None:
            self._waiting[identity] = [waiter]
            return True
        waiting.append(waiter)
        return False

    def waiting(self, identity: Identity) -> list[Waiter]:
        """Who waits."""
        return list(self._waiting.get(identity, ()))

    def leave(self, identity: Identity, gone: Callable[[Waiter], bool]) -> list[Waiter]:
        """Those who wait no longer. When the last one leaves, the next to join is a first again."""
        waiting = self._waiting.get(identity, [])
        left = [waiter for waiter in waiting if gone(waiter)]
        if left:
            stay = [waiter for waiter in waiting if not gone(waiter)]
            if stay:
                self._waiting[identity] = stay
            else:
                self.land(identity)
        return left

    def land(self, identity: Identity) -> list[Waiter]:
        """The work is done: everybody who waited for it."""
        self._gathered.pop(identity, None)
        return self._waiting.pop(identity, [])

    def gather(self, item: Item, rows: Vectors) -> Vectors | None:
        """Keep the vectors of one window. All of its text's once the last one is there; None before, and where nobody
        waits any more."""
        identity, window = item.identity, item.window
        if identity not in self._waiting or identity.text.chunk is None or window is None:
            return None
        if identity not in self._gathered:
            self._gathered[identity] = WindowAssembler(
                window.of, identity.text.chunk.mode, identity.encoder.hidden_size
            )
        gathered = self._gathered[identity]
        return gathered.rows if gathered.add(window.number, rows) else None
