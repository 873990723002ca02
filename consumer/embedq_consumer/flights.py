"""Equal texts under way are computed once. Pure, one owner (the pipeline)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from embedq_consumer.batching import Lane
from embedq_consumer.engine import Encoder, Tokens
from embedq_consumer.jobs import InFlight
from embedq_shared.messages import Truncate

Waiter = tuple[InFlight, int]
"""One input of a job."""


class Identity(msgspec.Struct, frozen=True, gc=False):
    """What the model sees of an input. The lane belongs to it, so that no interactive text waits for a bulk one."""

    lane: Lane
    text: str
    prompt: str
    truncate: Truncate

    @classmethod
    def of(cls, job: InFlight, index: int) -> Identity:
        """Of one input; dimensions and dtype are no part of it, since each waiter cuts its own vector."""
        request = job.request
        return cls(job.record.lane, request.texts[index], request.prompt, request.truncate)


class Item(msgspec.Struct, frozen=True, gc=False):
    """One text that waits for a micro-batch. `arrived` is monotonic seconds."""

    identity: Identity
    encoder: Encoder
    text: Tokens
    arrived: float

    @property
    def cost(self) -> int:
        """Its share of the token budget."""
        return self.text.cost

    @property
    def lane(self) -> Lane:
        """Which queue it waits in."""
        return self.identity.lane


class Flights:
    """Who waits for which text's vector.

    Invariants: of equal inputs the first to join starts the work and no other does; whoever joined is handed out
    exactly once, by `leave` or by `land`.
    """

    def __init__(self) -> None:
        self._waiting: dict[Identity, list[Waiter]] = {}

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
                del self._waiting[identity]
        return left

    def land(self, identity: Identity) -> list[Waiter]:
        """The work is done: everybody who waited for it."""
        return self._waiting.pop(identity, [])
