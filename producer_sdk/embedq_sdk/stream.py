"""A bounded window of jobs over a lazy source of texts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from typing import Final, Protocol

import msgspec
import numpy.typing as npt

from embedq_sdk.embeddings import FinishedJob, JobOutcome, Vectors, as_array, job_failed, vector
from embedq_sdk.errors import ClientClosed, EmbedError, InvalidArgument, KafkaUnavailable
from embedq_sdk.job_options import (
    Column,
    JobInputs,
    JobLimits,
    JobOptions,
    checked_count,
    checked_timeout,
    listed_column,
    plain,
    text_size,
)
from embedq_sdk.shown import Shown
from embedq_sdk.transport import Deadline, Lifetime, PendingJob
from embedq_shared.weighted_semaphore import WeightedSemaphore

_TEXTS_PER_TURN: Final = 64
"""Texts pulled from a plain iterable before other tasks get their turn: a fast source must not keep the loop to itself."""


class Embedded(Shown, frozen=True, kw_only=True, eq=False):
    """One text of a stream, or with late chunking one span of it. Either `vector` or `error` is there.

    `vector` is float32 (dimensions,), or uint8 (dimensions / 8,) with dtype "binary". `span` is there with late chunking
    alone: the vector stands for `text[span[0]:span[1]]`.
    """

    index: int
    text: str
    vector: Vectors | None = None
    model_version: str | None = None
    tokens: int | None = None
    truncated: bool | None = None
    cached: bool | None = None
    error: EmbedError | None = None
    span: tuple[int, int] | None = None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Vectors:
        """The vector.

        Raises:
            EmbedError: there is none, for this reason.
        """
        if self.vector is None:
            raise self.error or EmbedError()
        return as_array(self.vector, dtype, copy)


class StreamedJob(msgspec.Struct, frozen=True, eq=False):
    """A job of a stream that has ended: the index of its first text, its texts, and its outcome."""

    first: int
    inputs: JobInputs
    outcome: JobOutcome

    def items(self) -> Iterator[Embedded]:
        """The outcome text by text."""
        if isinstance(self.outcome, EmbedError):
            for n, text in enumerate(self.inputs.texts):
                yield Embedded(index=self.first + n, text=text, error=self.outcome)
            return
        first, texts = self.first, self.inputs.texts
        for part in self.outcome:
            version, dtype = part.model_version, part.dtype
            for datum in part.data:
                yield Embedded(
                    index=first + datum.index,
                    text=texts[datum.index],
                    vector=vector(datum, dtype) if datum.error is None else None,
                    model_version=version,
                    tokens=datum.tokens,
                    truncated=datum.truncated,
                    cached=datum.cached,
                    error=None if datum.error is None else job_failed(datum.error),
                    span=datum.span,
                )


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream cuts its source into jobs, and how much it holds.

    Raises:
        InvalidArgument: a number is not positive.
    """

    limits: JobLimits
    timeout: float
    """Seconds that each job may take."""
    batch_size: int
    """Texts in one job at most."""
    in_flight: int
    """Texts that are pulled and not yet taken out, at most."""
    in_flight_bytes: int = 32 << 20
    """The same in bytes as UTF-8."""
    flush_after: float = 0.02
    """Seconds that an incomplete batch waits for more texts."""
    ordered: bool = True
    """Whether outcomes come in the order of the source, or as they finish."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "in_flight", "in_flight_bytes"):
            checked_count(name, getattr(self, name))
        for name in ("flush_after", "timeout"):
            checked_timeout(name, getattr(self, name))


class JobStarter(Protocol):
    """What a stream needs of a `JobRunner`."""

    in_flight: WeightedSemaphore
    lifetime: Lifetime

    async def ready(self, options: JobOptions, deadline: Deadline) -> None:
        """Wait until it is known where such jobs go."""

    def begin(self, inputs: JobInputs, options: JobOptions, deadline: Deadline) -> PendingJob:
        """Send one job whose weight was acquired."""

    def finish(self, job: PendingJob) -> None:
        """Give its weight back."""


class _WindowEntry(msgspec.Struct, frozen=True, eq=False):
    """A job in the window, and the index of its first text."""

    first: int
    inputs: JobInputs


class JobStream:
    """Pulls texts while the window has space, sends them in jobs, and gives their outcomes out.

    Invariants:
        - A text is in the window from its pull until its job's outcome was taken out, so a slow taker stops the source.
        - The window holds at most `in_flight` texts, and `in_flight_bytes` bytes or one text.
        - The client's in-flight weight is held from a text's pull until its job ends, taken out or not, so a slow taker
          never blocks other calls.
        - When `jobs` ends, for whatever reason, the source is no longer read, and by the event loop's next turn no weight
          is held.
    """

    def __init__(self, runner: JobStarter, job_options: JobOptions, options: StreamOptions) -> None:
        self._runner = runner
        self._job_options = job_options
        self._options = options
        self._batch_size = min(options.batch_size, options.in_flight, options.limits.max_inputs)
        self._max_job_bytes = options.limits.max_job_bytes
        self._max_texts = options.in_flight
        self._max_bytes = options.in_flight_bytes
        self._in_flight = runner.in_flight
        self._pulled = 0
        self._texts = 0
        self._bytes = 0
        self._batch: list[str] = []
        self._batch_bytes = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._entries: dict[PendingJob, _WindowEntry] = {}  # in the order of the source
        self._finished: deque[PendingJob] = deque()
        self._fault: BaseException | None = None
        self._space = asyncio.Event()
        self._news = asyncio.Event()
        self._source_ended = False

    async def jobs(
        self, source: Iterable[str] | AsyncIterable[str] | Column
    ) -> AsyncGenerator[StreamedJob, None]:
        """The jobs of a source as they end. A source that raises does so here, after the outcomes of what it gave before.

        Raises:
            InvalidArgument: the source is not iterable, or gave something that no job can carry.
            KafkaUnavailable, TopicMissing, ClientClosed, WrongEventLoop.
        """
        self._runner.lifetime.check()
        source = listed_column(source, "texts")
        if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, (Iterable, AsyncIterable)):
            raise InvalidArgument(
                argument="texts", expected="an iterable of strings", got=type(source).__name__
            )
        await self._runner.ready(self._job_options, Deadline.after(self._options.timeout))
        feeder = asyncio.create_task(self._feed(source), name="embedq-stream")
        try:
            while (job := await self._next()) is not None:
                entry = self._entries.pop(job)
                yield StreamedJob(entry.first, entry.inputs, _outcome(job))
                self._texts -= len(entry.inputs.texts)
                self._bytes -= entry.inputs.size
                self._space.set()
            if self._fault is not None:
                raise self._fault  # the source may never give another text, so it is not waited for
            await feeder  # raises what the source raised
        finally:
            feeder.cancel()
            await asyncio.wait([feeder])
            if not feeder.cancelled():
                feeder.exception()
            self._cancel_flush()
            self._in_flight.release(len(self._batch), self._batch_bytes)
            self._batch, self._batch_bytes = [], 0
            for job in self._entries:
                job.drop()  # `_job_ended` then gives its weight back

    async def collect(
        self, source: Iterable[str] | AsyncIterable[str] | Column
    ) -> tuple[list[JobInputs], list[FinishedJob]]:
        """All jobs of a source that ends.

        Raises:
            KafkaUnavailable, ClientClosed: at the first job that ended so, since the others would, too.
            InvalidArgument: as `jobs`, or the source is empty.
        """
        inputs: list[JobInputs] = []
        finished: list[FinishedJob] = []
        async with aclosing(self.jobs(source)) as ended:
            async for job in ended:
                if isinstance(job.outcome, KafkaUnavailable | ClientClosed):
                    raise job.outcome
                inputs.append(job.inputs)
                finished.append(FinishedJob(count=len(job.inputs.texts), outcome=job.outcome))
        if not finished:
            raise InvalidArgument(argument="texts", expected="at least one text", got="none")
        return inputs, finished

    async def _next(self) -> PendingJob | None:
        """The next job to give out, when it has ended; None after the last."""
        while True:
            if self._options.ordered:
                job = next(iter(self._entries), None)
                if job is not None and job.future.done():
                    return job
            elif self._finished:
                return self._finished.popleft()
            if self._source_ended and not self._entries:
                return None
            self._news.clear()
            await self._news.wait()

    async def _feed(self, source: Iterable[str] | AsyncIterable[str]) -> None:
        try:
            if isinstance(source, AsyncIterable):
                async for text in source:
                    await self._add(text)
            else:
                for text in source:
                    await self._add(text)
                    if self._pulled % _TEXTS_PER_TURN == 0:
                        await asyncio.sleep(0)
            self._flush()
        except Exception:
            with suppress(EmbedError):
                self._flush()  # what it gave before
            raise
        finally:
            self._source_ended = True
            self._news.set()

    async def _add(self, text: str) -> None:
        """Put a text into the batch, once the client has room for it, then wait until the window has space for another."""
        size = text_size(text, f"texts[{self._pulled}]", self._max_job_bytes)
        if self._batch and self._batch_bytes + size > self._max_job_bytes:
            self._flush()
        if not self._in_flight.try_acquire(1, size):
            self._flush()
            await self._in_flight.acquire(1, size)
        self._batch.append(plain(text))
        self._batch_bytes += size
        self._pulled += 1
        self._texts += 1
        self._bytes += size
        if len(self._batch) >= self._batch_size:
            self._flush()
        elif self._flush_timer is None:
            loop = asyncio.get_running_loop()
            self._flush_timer = loop.call_later(self._options.flush_after, self._flush_in_time)
        while self._texts >= self._max_texts or self._bytes >= self._max_bytes:
            self._flush()
            self._space.clear()
            await self._space.wait()

    def _flush_in_time(self) -> None:
        """The source has paused. If the client was closed meanwhile, this is where a waiting taker learns of it."""
        try:
            self._flush()
        except EmbedError as error:
            self._fault = error
            self._source_ended = True
            self._news.set()

    def _flush(self) -> None:
        """Send the batch as one job."""
        self._cancel_flush()
        if not self._batch:
            return
        inputs = JobInputs(self._batch, self._batch_bytes)
        job = self._runner.begin(inputs, self._job_options, Deadline.after(self._options.timeout))
        self._entries[job] = _WindowEntry(self._pulled - len(self._batch), inputs)
        self._batch, self._batch_bytes = [], 0
        job.future.add_done_callback(lambda _: self._job_ended(job))

    def _cancel_flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _job_ended(self, job: PendingJob) -> None:
        self._runner.finish(job)
        if not self._options.ordered:
            self._finished.append(job)
        self._news.set()


def _outcome(job: PendingJob) -> JobOutcome:
    """How a job ended. An error that is not the SDK's, such as a bug, is raised."""
    error = job.future.exception()
    if error is None:
        return job.future.result()
    if isinstance(error, EmbedError):
        return error
    raise error
