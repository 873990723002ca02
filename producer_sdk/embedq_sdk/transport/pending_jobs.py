"""Jobs on their way: what was sent, what is awaited, and who is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from embedq_sdk.embeddings import Outcome, PartJoiner, ReadFailure, ReadResult
from embedq_sdk.errors import JobFailed, job_failed
from embedq_shared.headers import Header

FIRST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0


def backoff(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds before attempt number `attempt` + 1: doubles each time, half of it random so that clients spread out."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 16))
    return longest * (0.5 + 0.5 * draw())


class PendingJob:
    """One job on its way.

    `future` ends with the parts of the result, or with an exception; for a job whose result goes elsewhere it ends with
    [] once Kafka has the job. Between the two, the sender and the inbox refer to the call, never own it.
    """

    __slots__ = (
        "acknowledged",
        "attempt",
        "awaits_reply",
        "correlation",
        "count",
        "future",
        "headers",
        "joiner",
        "size",
        "timeout",
        "timer",
        "topic",
        "value",
        "waiting",
    )

    def __init__(
        self,
        future: asyncio.Future[list[ReadResult]],
        *,
        topic: str,
        value: bytes,
        headers: list[Header],
        correlation: bytes,
        count: int,
        size: int,
        timeout: float,
        awaits_reply: bool = True,
    ) -> None:
        self.future = future
        self.topic = topic
        self.value = value
        self.headers = headers
        self.correlation = correlation
        self.count = count
        self.size = size
        self.timeout = timeout
        self.awaits_reply = awaits_reply
        self.joiner: PartJoiner | None = None
        self.acknowledged = False
        self.attempt = 0
        self.timer: asyncio.TimerHandle | None = None
        self.waiting: asyncio.TimerHandle | None = None

    def fail(self, error: Exception) -> None:
        """End the call, if it has not ended."""
        if not self.future.done():
            self.future.set_exception(error)

    def drop(self) -> None:
        """Nobody waits any more."""
        if self.timer is not None:
            self.timer.cancel()
        if self.waiting is not None:
            self.waiting.cancel()
        if not self.future.done():
            self.future.cancel()
        elif not self.future.cancelled():
            self.future.exception()  # looked at, so asyncio does not complain that nobody did


class PendingReplies:
    """Every call that awaits a reply, by correlation id. Pure: it neither reads nor sends.

    A reply for an id that is not here is late, a repeat, or another client's (several share a partition): counted,
    and not even decoded.
    """

    def __init__(self) -> None:
        self._open: dict[bytes, PendingJob] = {}
        self.unknown = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, call: PendingJob) -> None:
        """Expect replies for a call."""
        self._open[call.correlation] = call

    def close(self, call: PendingJob) -> None:
        """Expect none any more."""
        self._open.pop(call.correlation, None)

    def find(self, correlation: bytes | None) -> PendingJob | None:
        """The call of a reply; None, and counted, if nobody here waits for it."""
        call = None if correlation is None else self._open.get(correlation)
        if call is None or call.future.done():
            self.unknown += 1
            return None
        return call

    def calls(self) -> list[PendingJob]:
        """All of them."""
        return list(self._open.values())


def settle(call: PendingJob, reply: ReadResult | ReadFailure) -> Outcome | None:
    """What a reply makes of its call: its outcome, or None while parts are missing."""
    if isinstance(reply, ReadFailure):
        return job_failed(reply.error)
    if reply.parts == 1:
        return [reply]
    if call.joiner is None:
        call.joiner = PartJoiner()
    return call.joiner.add(reply)


def worth_retrying(outcome: Outcome) -> bool:
    """Whether the same job may succeed later. A retry sends the whole job, so that one model makes all its vectors."""
    if isinstance(outcome, list):
        return any(d.error is not None and d.error.retryable for part in outcome for d in part.data)
    return isinstance(outcome, JobFailed) and outcome.retryable
