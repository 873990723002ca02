"""Equal texts under way are computed once. Pure; the text queue lets inputs join, the batch runner resolves them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from embedq_consumer.batching.windows import Vectors, WindowAssembler
from embedq_consumer.engine import Chunked, Encoder, Text, Tokens
from embedq_consumer.intake.jobs import JobState, Outcome
from embedq_shared.topics import Lane

__all__ = ["Identity", "JobInput", "QueuedText", "Settled", "SingleFlight", "Window"]

JobInput = tuple[JobState, int]
"""One input of a job: the job, and the input's index."""
Settled = tuple[JobState, int, Outcome]
"""One input of a job, and what became of it."""


class Identity(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """Deduplication key: everything that the model's vector of an input depends on, and the lane.

    The lane belongs to it so that no interactive text waits for a bulk one; the encoder, since windows of an expired
    job may still be queued when another model serves. Dimensions and dtype do not: each waiter cuts its own vector.
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


class QueuedText(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One text, or one window of it, that waits for a micro-batch. `arrived` is monotonic seconds.

    `client` and `job` (a `JobState.number`) are those of the input that it was queued for, in whose turns it runs.
    """

    identity: Identity
    tokens: Tokens
    arrived: float
    window: Window | None = None
    client: bytes = b""
    job: int = 0

    @property
    def cost(self) -> int:
        """Its share of the token budget."""
        return self.tokens.cost

    @property
    def lane(self) -> Lane:
        """Which queue it waits in."""
        return self.identity.lane


class SingleFlight:
    """Which inputs wait for which text's vector.

    Invariants:
        - Of a client's equal inputs the first to join starts the work, and no other does. Another client's first one is queued
          in that client's own turns, so that it need not wait for the turns of the one before; whichever runs first
          answers all.
        - Each input that joined is handed out exactly once, by `abandon` or by `resolve`.
        - Windows are kept only while an input waits for their text.
    """

    def __init__(self) -> None:
        self._waiters: dict[Identity, list[JobInput]] = {}
        self._clients: dict[Identity, set[bytes]] = {}  # of the texts that several clients started
        self._assemblers: dict[Identity, WindowAssembler] = {}

    def join(self, identity: Identity, waiter: JobInput) -> bool:
        """Wait for this text's vector. True for the first of its client, who must start the work."""
        waiters = self._waiters.get(identity)
        if waiters is None:
            self._waiters[identity] = [waiter]
            return True
        client = waiter[0].client
        clients = self._clients.get(identity) or {waiters[0][0].client}
        waiters.append(waiter)
        if client in clients:
            return False
        self._clients[identity] = clients | {client}
        return True

    def waiters(self, identity: Identity) -> list[JobInput]:
        """The inputs that wait for this text's vector."""
        return list(self._waiters.get(identity, ()))

    def abandon(self, identity: Identity, gone: Callable[[JobInput], bool]) -> list[JobInput]:
        """Remove and return the waiters that are `gone`. After the last one, the next to join is a first again."""
        waiters = self._waiters.get(identity, [])
        leaving = [waiter for waiter in waiters if gone(waiter)]
        if leaving:
            staying = [waiter for waiter in waiters if not gone(waiter)]
            if staying:
                self._waiters[identity] = staying
            else:
                self.resolve(identity)
        return leaving

    def unexpired(self, identity: Identity, now_ms: float) -> tuple[list[JobInput], list[JobInput]]:
        """The inputs that wait for this text, and those that did so until now and whose jobs have expired."""
        waiters = self._waiters.get(identity, [])
        for job, _ in waiters:
            if job.headers.deadline_ms is not None and job.expired(now_ms):
                break
        else:
            return list(waiters), []
        expired = self.abandon(identity, lambda waiter: waiter[0].expired(now_ms))
        return self.waiters(identity), expired

    def resolve(self, identity: Identity) -> list[JobInput]:
        """The work is done: remove and return all who waited for it."""
        self._assemblers.pop(identity, None)
        self._clients.pop(identity, None)
        return self._waiters.pop(identity, [])

    def assemble(self, text: QueuedText, rows: Vectors) -> Vectors | None:
        """Keep the vectors of one window, float32 (rows, hidden_size).

        Once the last window is there: all vectors of its text. None before that, and where no input waits any more.
        """
        identity, window = text.identity, text.window
        if identity not in self._waiters or identity.text.chunk is None or window is None:
            return None
        if identity not in self._assemblers:
            self._assemblers[identity] = WindowAssembler(
                window.of, identity.text.chunk.mode, identity.encoder.hidden_size
            )
        assembler = self._assemblers[identity]
        return assembler.rows if assembler.add(window.number, rows) else None
