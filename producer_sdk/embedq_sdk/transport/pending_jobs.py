"""Jobs on their way: what was sent, which replies are expected, and what a reply means. Nothing here does I/O."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from embedq_sdk.embeddings import JobOutcome, PartJoiner, ReadFailure, ReadResult, job_failed
from embedq_sdk.errors import JobFailed
from embedq_sdk.reply_checks import Asked, check_whole
from embedq_shared.backoff import backoff
from embedq_shared.headers import Header
from embedq_shared.topics import Lane

FIRST_BACKOFF_S: Final = 0.1
"""An overloaded replica has finished a micro-batch or two by then."""
LONGEST_BACKOFF_S: Final = 5.0
"""A retry should still fit several times into the default deadline of 30 s."""


def retry_pause(attempt: int) -> float:
    """Seconds to wait before a job is sent again, after attempt number `attempt` (from 0)."""
    return backoff(attempt, first_s=FIRST_BACKOFF_S, longest_s=LONGEST_BACKOFF_S)


class Route(NamedTuple):
    """What decides to which topic a job goes: the alias that it names, if it names one, its lane and its id."""

    model: str | None
    lane: Lane
    id: str


class PendingJob:
    """One job from the moment it is queued until its caller has its outcome.

    `future` ends with the parts of the result or with an exception; for a job whose result goes to the results topic
    it ends with [] once Kafka has acknowledged the job.

    Invariants:
        - `future` ends once; whatever comes later changes nothing.
        - After `drop` no timer of the job is running.
    """

    __slots__ = (
        "acknowledged",
        "asked",
        "attempt",
        "awaits_reply",
        "correlation",
        "count",
        "deadline_timer",
        "future",
        "headers",
        "joiner",
        "max_attempts",
        "retry_timer",
        "route",
        "size",
        "timeout",
        "topic",
        "value",
    )

    # More than six parameters: all are facts of one record and its caller, and all are read by name in other files.
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
        max_attempts: int | None = None,
        asked: Asked | None = None,
        route: Route | None = None,
    ) -> None:
        self.future = future
        self.topic = topic
        self.route = route
        """Where it may go to; None where its topic is final."""
        self.value = value
        self.headers = headers
        self.correlation = correlation
        self.count = count
        """Number of inputs."""
        self.size = size
        """Bytes of the inputs as UTF-8."""
        self.timeout = timeout
        """Seconds that the caller allowed, for error messages; the deadline itself is `deadline_timer`."""
        self.awaits_reply = awaits_reply
        self.max_attempts = max_attempts
        """How often it is sent at most while its error may heal; None: until its deadline."""
        self.asked = asked or Asked(count=count)
        """What its reply must be like."""
        self.joiner: PartJoiner | None = None
        self.acknowledged = False
        self.attempt = 0
        self.deadline_timer: asyncio.TimerHandle | None = None
        self.retry_timer: asyncio.TimerHandle | None = None

    @property
    def is_last_attempt(self) -> bool:
        """Whether an error ends it, even one that may heal."""
        return self.max_attempts is not None and self.attempt + 1 >= self.max_attempts

    def complete(self, parts: list[ReadResult]) -> None:
        """End the job with a result, if it has not ended."""
        if not self.future.done():
            self.future.set_result(parts)

    def fail(self, error: Exception) -> None:
        """End the job with an error, if it has not ended."""
        if not self.future.done():
            self.future.set_exception(error)

    def drop(self) -> None:
        """Stop the timers; the caller no longer waits for this job."""
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        if self.retry_timer is not None:
            self.retry_timer.cancel()
        if not self.future.done():
            self.future.cancel()
        elif not self.future.cancelled():
            self.future.exception()  # retrieved, so that asyncio does not log it as never retrieved

    def restart(self) -> None:
        """Begin the next attempt."""
        self.attempt += 1
        self.begin_anew()
        if self.retry_timer is not None:
            self.retry_timer.cancel()
            self.retry_timer = None

    def begin_anew(self) -> None:
        """What it has brought so far no longer counts."""
        self.joiner = None
        self.acknowledged = False


class PendingReplies:
    """The jobs that expect a reply, by correlation id.

    Invariants:
        - A reply belongs to at most one job, and to none that has ended.
        - A reply that belongs to no job is late, a repeat, or another client's, since several clients share a partition:
          it is counted in `unclaimed` and not even decoded.
    """

    def __init__(self) -> None:
        self._jobs: dict[bytes, PendingJob] = {}
        self.unclaimed = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: PendingJob) -> None:
        """Expect replies to a job."""
        self._jobs[job.correlation] = job

    def remove(self, job: PendingJob) -> None:
        """Expect no more replies to a job. It need not be here."""
        self._jobs.pop(job.correlation, None)

    def claim(self, correlation: bytes | None) -> PendingJob | None:
        """The job that a reply belongs to; None if there is none, which is counted."""
        job = None if correlation is None else self._jobs.get(correlation)
        if job is None or job.future.done():
            self.unclaimed += 1
            return None
        return job

    def jobs(self) -> list[PendingJob]:
        """All jobs that expect a reply."""
        return list(self._jobs.values())


def settle(job: PendingJob, reply: ReadResult | ReadFailure) -> JobOutcome | None:
    """The outcome that a reply gives its job; None while parts are missing.

    Raises:
        BadReply: the parts do not make a result to this job.
    """
    if isinstance(reply, ReadFailure):
        return job_failed(reply.error)
    if job.joiner is None:
        job.joiner = PartJoiner()
    parts = job.joiner.add(reply)
    if parts is not None:
        check_whole(parts, job.asked)
    return parts


def worth_retrying(outcome: JobOutcome) -> bool:
    """Whether the same job may succeed later. A retry sends the whole job, so that one model makes all its vectors."""
    if isinstance(outcome, list):
        return any(d.error is not None and d.error.retryable for part in outcome for d in part.data)
    return isinstance(outcome, JobFailed) and outcome.retryable
