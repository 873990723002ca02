"""Running jobs: admitted, sent, retried and ended, whatever happens to them on the way."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from embedq_sdk.embeddings import (
    Embeddings,
    FinishedJob,
    assemble,
    outdated,
    require_one_version,
)
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    JobFailed,
    KafkaRefused,
    KafkaUnavailable,
    Overloaded,
    TopicMissing,
    UnknownModel,
    UnreadableReply,
)
from embedq_sdk.job_options import JobInputs, JobOptions
from embedq_sdk.reply_checks import Asked, BadReply, read_checked
from embedq_sdk.transport.lifetime import Lifetime
from embedq_sdk.transport.pending_jobs import (
    PendingJob,
    PendingReplies,
    Route,
    retry_pause,
    settle,
    worth_retrying,
)
from embedq_sdk.transport.routing import Router
from embedq_shared import topics as names
from embedq_shared.codec import CONTENT_TYPES, Format
from embedq_shared.headers import Header, reply_partition_bytes
from embedq_shared.topics import Topics
from embedq_shared.weighted_semaphore import WeightedSemaphore

_MSGPACK_TYPE: Final = names.MSGPACK.encode()
_CORRELATION: Final = names.CORRELATION[0]
_ID_BYTES: Final = 16
_IDS_AT_ONCE: Final = 256
"""Asking the system gives the interpreter's lock away, for milliseconds where another thread of the program has work."""


class JobTransport(Protocol):
    """What carries jobs away and brings replies: Kafka, or a fake in tests."""

    @property
    def reply_partition(self) -> int:
        """The partition of the reply topic that is read here."""

    @property
    def silent(self) -> bool:
        """Whether the broker has stopped answering."""

    def send(self, job: PendingJob) -> None:
        """Send a job soon, and set `acknowledged` when it has arrived. Never waits, never raises."""

    def unavailable(self, reason: str) -> KafkaUnavailable:
        """The error that names the servers."""


class ReplyRecord(Protocol):
    """A record of the reply topic, as far as it is looked at."""

    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...
    @property
    def offset(self) -> int: ...


class Deadline(msgspec.Struct, frozen=True):
    """When a call ends: `at` on the event loop's clock, `timeout` seconds after it began.

    Until then a job whose error may heal is sent again, `max_attempts` times in all at most; None: as often as the runner
    allows.
    """

    at: float
    timeout: float
    max_attempts: int | None = None

    @classmethod
    def after(cls, timeout: float, *, max_attempts: int | None = None) -> Deadline:
        """In `timeout` seconds from now."""
        return cls(asyncio.get_running_loop().time() + timeout, timeout, max_attempts)


class _RandomIds:
    """Ids that nobody else has. A process that is forked cannot go on with a client, nor with its ids."""

    def __init__(self) -> None:
        self._left: list[bytes] = []

    def next(self) -> bytes:
        """Another one."""
        if not self._left:
            some = os.urandom(_ID_BYTES * _IDS_AT_ONCE)
            self._left = [some[start : start + _ID_BYTES] for start in range(0, len(some), _ID_BYTES)]
        return self._left.pop()


class JobRunner:
    """Turns inputs into outcomes: one job is one record, one or more replies, perhaps several attempts, one end.

    Invariants:
        - Every job that was begun ends: with a result, with the service's error, at its deadline, or when the client
          closes or breaks.
        - What a job holds of `in_flight` is given back once, when `finish` is called for it.
        - The outcome of `run` comes from one attempt for each job; a retry forgets what an earlier attempt brought.
        - After `close` or `break_down` nothing new is begun.
    """

    def __init__(
        self,
        transport: JobTransport,
        router: Router,
        in_flight: WeightedSemaphore,
        pause: Callable[[int], float] = retry_pause,
        client: bytes = b"",
        max_attempts: int | None = None,
    ) -> None:
        """`client` says whose jobs these are, for fair shares; empty: the reply address does. `max_attempts` is for jobs whose
        deadline does not say; None: until then."""
        self._transport = transport
        self._client = client
        self._router = router
        self.in_flight = in_flight
        """Weighs texts and their bytes; `JobStream` acquires from it text by text."""
        self._pause = pause
        self._max_attempts = max_attempts
        self._replies = PendingReplies()
        self._submitted: set[PendingJob] = set()
        self.lifetime = Lifetime()
        self._reply_headers: tuple[Header, ...] = ()
        self._ids = _RandomIds()

    # -- life ---------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Accept jobs. The transport must be connected, since each job names the reply partition.

        Raises:
            ClientClosed: it was closed while the transport connected.
        """
        self.lifetime.opened()
        self._reply_headers = _address(self._router.topics, self._transport)

    def move(self) -> None:
        """The reply topic is another one than before: what was on its way to the old one will not come, so that all jobs of now
        are sent again, with the new address. What comes twice is counted, and claimed by nobody."""
        former, self._reply_headers = self._reply_headers, _address(self._router.topics, self._transport)
        for job in self._replies.jobs():
            job.headers = [*(each for each in job.headers if each not in former), *self._reply_headers]
            if job.retry_timer is None and not job.future.done():  # the others will be sent anyway
                job.begin_anew()
                self._transport.send(job)

    def close(self) -> None:
        """End all jobs with ClientClosed and accept no more.

        Raises:
            WrongEventLoop.
        """
        self.lifetime.close()
        self._fail_all(ClientClosed)

    def break_down(self, fault: BaseException) -> None:
        """The transport stopped by itself, which is our bug: every call, now and later, ends with `fault` as cause."""
        self.lifetime.break_down(fault)
        self._fail_all(self.lifetime.ended)

    def refuse(self, error: KafkaRefused | TopicMissing) -> None:
        """Kafka lets us read no replies, or has no topic for them: the jobs that await one now end with `error`."""
        for job in self._replies.jobs():
            job.fail(type(error)(**vars(error)))

    def _fail_all(self, error: Callable[[], Exception]) -> None:
        for job in (*self._replies.jobs(), *self._submitted):
            job.fail(error())

    @property
    def awaiting_reply(self) -> int:
        """Number of jobs that expect a reply."""
        return len(self._replies)

    @property
    def unclaimed_replies(self) -> int:
        """Number of replies that belonged to no job here."""
        return self._replies.unclaimed

    # -- jobs of a call -----------------------------------------------------------------------------------------------

    async def ready(self, options: JobOptions, deadline: Deadline) -> None:
        """Check that the client can be used, and wait until it is known where such jobs go; raises what `run` raises."""
        self.lifetime.check()
        await self._router.ready(options.model, deadline.at)

    async def run(
        self, inputs: Sequence[JobInputs], options: JobOptions, deadline: Deadline
    ) -> list[FinishedJob]:
        """The outcomes of one call's jobs, in order. What the service says about a job is an outcome.

        Raises:
            DeadlineExceeded, KafkaUnavailable, Overloaded, UnreadableReply, ClientClosed, WrongEventLoop.
        """
        await self.ready(options, deadline)
        jobs: list[PendingJob] = []
        try:
            for each in inputs:
                await _acquire(self.in_flight, len(each.texts), each.size, deadline)
                try:
                    jobs.append(self.begin(each, options, deadline))
                except BaseException:
                    self.in_flight.release(len(each.texts), each.size)
                    raise
            return [await _finished(job) for job in jobs]
        finally:
            for job in jobs:
                self.finish(job)

    async def merge(
        self,
        finished: list[FinishedJob],
        inputs: Sequence[JobInputs],
        options: JobOptions,
        deadline: Deadline,
        *,
        allow_mixed: bool,
    ) -> Embeddings:
        """The outcomes of a call as one array, unless `allow_mixed` `of_one_model`, whose errors it raises.

        Raises:
            EmbedError: no job has a result; this is the first one's error.
        """
        if not allow_mixed:
            finished = await self.of_one_model(finished, inputs, options, deadline)
        return assemble(finished)

    async def of_one_model(
        self,
        finished: list[FinishedJob],
        inputs: Sequence[JobInputs],
        options: JobOptions,
        deadline: Deadline,
    ) -> list[FinishedJob]:
        """The outcomes of a call from one model: jobs of an older model are run once more.

        Only one such round, so that a call never chases a service that keeps reloading.

        Raises:
            MixedModelVersions: even then several models made the vectors.
            EmbedError: as `run`.
        """
        old = outdated(finished)
        if not old:
            return finished
        again = dict(zip(old, await self.run([inputs[n] for n in old], options, deadline), strict=True))
        finished = [again.get(n, job) for n, job in enumerate(finished)]
        require_one_version(finished)
        return finished

    def begin(self, inputs: JobInputs, options: JobOptions, deadline: Deadline) -> PendingJob:
        """Send one job and expect its reply. The caller has acquired its weight, and calls `finish` in the end.

        Raises:
            ClientClosed, WrongEventLoop.
        """
        self.lifetime.check()
        loop = asyncio.get_running_loop()
        correlation = self._ids.next()
        texts = inputs.texts
        route = Route(options.model, options.lane, correlation.hex())
        job = PendingJob(
            loop.create_future(),
            topic=self._router.topic(route),
            route=route,
            value=options.encode(texts[0] if len(texts) == 1 else texts, route.id),
            headers=[
                (_CORRELATION, correlation),
                *self._reply_headers,
                *_whose(options, self._client),
                (names.DEADLINE, b"%d" % int((time.time() + deadline.at - loop.time()) * 1000)),
                *_trace(options),
            ],
            correlation=correlation,
            count=len(texts),
            size=inputs.size,
            timeout=deadline.timeout,
            max_attempts=self._max_attempts if deadline.max_attempts is None else deadline.max_attempts,
            asked=Asked(
                count=len(texts),
                dtype=options.dtype or "float32",
                dimensions=options.dimensions,
                late=options.late,
            ),
        )
        job.deadline_timer = loop.call_at(deadline.at, self._expire, job)
        self._replies.add(job)
        self._transport.send(job)
        return job

    def finish(self, job: PendingJob) -> None:
        """The caller has the outcome, or gave up: expect no more replies and give the weight back."""
        self._replies.remove(job)
        job.drop()
        self.in_flight.release(job.count, job.size)

    # -- what happens to a job ----------------------------------------------------------------------------------------

    def deliver(self, record: ReplyRecord) -> None:
        """Take a record of the reply partition. Never raises."""
        headers = dict(record.headers)
        job = self._replies.claim(headers.get(_CORRELATION))
        if job is None:
            return
        try:
            outcome = settle(job, read_checked(record.value, headers.get(names.CONTENT_TYPE)))
        except BadReply as bad:
            job.fail(UnreadableReply(detail=f"{bad} at offset {record.offset}"))
            return
        if outcome is None or (worth_retrying(outcome) and self._retry(job)):
            return
        if isinstance(outcome, list):
            job.complete(outcome)
        elif isinstance(outcome, UnknownModel):
            self._router.try_elsewhere(job, outcome, self._transport.send)
        else:
            job.fail(outcome)

    def _retry(self, job: PendingJob) -> bool:
        """Send the same job once more after a pause, if it may, and if that can end before its deadline."""
        if job.is_last_attempt:
            return False
        loop = asyncio.get_running_loop()
        pause = self._pause(job.attempt)
        if job.deadline_timer is None:
            raise RuntimeError("a job was sent without a deadline. This is a bug.")
        if loop.time() + pause >= job.deadline_timer.when():
            return False
        job.restart()
        job.retry_timer = loop.call_later(pause, _send_again, self._transport, job)
        return True

    def _expire(self, job: PendingJob) -> None:
        """The job's deadline has passed."""
        job.fail(_overdue(job, self._transport))

    # -- jobs whose results go to the results topic -------------------------------------------------------------------

    async def submit(
        self,
        texts: str | list[str],
        size: int,
        options: JobOptions,
        *,
        id: str,
        format: Format,
        timeout: float,
    ) -> None:
        """Publish one job of `size` bytes that has no deadline and no reply address; return when Kafka has it.

        Raises:
            KafkaUnavailable, Overloaded, ClientClosed, WrongEventLoop.
            InvalidArgument: the broker takes no record of this size.
        """
        deadline = Deadline.after(timeout)
        await self.ready(options, deadline)
        count = 1 if isinstance(texts, str) else len(texts)
        await _acquire(self.in_flight, count, size, deadline)
        try:
            self.lifetime.check()
            loop = asyncio.get_running_loop()
            job = PendingJob(
                loop.create_future(),
                topic=self._router.topic(Route(options.model, options.lane, id)),
                value=options.encode(texts, id, format),
                headers=[
                    (names.CONTENT_TYPE, CONTENT_TYPES[format].encode()),
                    *_whose(options, self._client),
                    *_trace(options),
                ],
                correlation=b"",
                count=count,
                size=size,
                timeout=timeout,
                awaits_reply=False,
            )
            job.deadline_timer = loop.call_at(deadline.at, self._expire_submitted, job)
            self._submitted.add(job)
            try:
                self._transport.send(job)
                await job.future
            finally:
                self._submitted.discard(job)
                job.drop()
        finally:
            self.in_flight.release(count, size)

    def _expire_submitted(self, job: PendingJob) -> None:
        job.fail(self._transport.unavailable(f"it did not acknowledge the job within {job.timeout:g} s"))


async def _acquire(in_flight: WeightedSemaphore, count: int, size: int, deadline: Deadline) -> None:
    if in_flight.try_acquire(count, size):
        return
    try:
        async with asyncio.timeout_at(deadline.at):
            await in_flight.acquire(count, size)
    except TimeoutError:
        texts, held = in_flight.held
        raise Overloaded(texts=texts, size=held, timeout=deadline.timeout) from None


def _address(topics: Topics, transport: JobTransport) -> tuple[Header, ...]:
    """Where replies shall go to, and what they shall be."""
    return (
        (names.REPLY_TOPIC[0], topics.replies.encode()),
        (names.REPLY_PARTITION[0], reply_partition_bytes(transport.reply_partition)),
        (names.CONTENT_TYPE, _MSGPACK_TYPE),
    )


def _send_again(transport: JobTransport, job: PendingJob) -> None:
    job.retry_timer = None
    transport.send(job)


def _overdue(job: PendingJob, transport: JobTransport) -> EmbedError:
    """What is likely wrong, where there is no reply in time."""
    if transport.silent:
        progress = "took the job, then stopped answering" if job.acknowledged else "did not take the job"
        return transport.unavailable(f"it {progress} within {job.timeout:g} s")
    progress = "the job is in Kafka" if job.acknowledged else "the job is on its way to Kafka"
    return DeadlineExceeded(timeout=job.timeout, progress=progress)


async def _finished(job: PendingJob) -> FinishedJob:
    """Wait for a job. An error of the service is an outcome; others are raised."""
    try:
        return FinishedJob(count=job.count, outcome=await job.future)
    except JobFailed as error:
        return FinishedJob(count=job.count, outcome=error)


def _whose(options: JobOptions, client: bytes) -> tuple[Header, ...]:
    """Whose job it is: the call says so, or else the client."""
    said = client if options.client_id is None else options.client_id.encode()
    return ((names.CLIENT, said),) if said else ()


def _trace(options: JobOptions) -> tuple[Header, ...]:
    return () if options.trace is None else ((names.TRACE[0], options.trace.encode()),)
