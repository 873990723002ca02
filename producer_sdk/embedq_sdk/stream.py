"""A bounded window of jobs over a lazy source of texts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator

import msgspec

from embedq_sdk.embeddings import Outcome, Vectors, vector
from embedq_sdk.errors import EmbedError, InvalidArgument, job_failed
from embedq_sdk.job_options import text_size
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_shared.weighted_semaphore import WeightedSemaphore


class Embedded(msgspec.Struct, frozen=True):
    """One text of a stream, or with late chunks one span of it. Either `vector` or `error` is there.

    `vector` is float32 (dimensions,), or uint8 (dimensions / 8,) with dtype "binary". `span` is there for late chunks
    alone: the vector stands for `text[span[0]:span[1]]`.
    """

    index: int
    text: str
    vector: Vectors | None
    model_version: str | None
    tokens: int | None = None
    truncated: bool | None = None
    cached: bool | None = None
    error: EmbedError | None = None
    span: tuple[int, int] | None = None


def items(first: int, texts: list[str], outcome: Outcome) -> Iterator[Embedded]:
    """One job's outcome text by text; `first` is the index of its first text."""
    if isinstance(outcome, EmbedError):
        for n, text in enumerate(texts):
            yield Embedded(first + n, text, None, None, error=outcome)
        return
    for part in outcome:
        for datum in part.data:
            failed = datum.error is not None
            yield Embedded(
                first + datum.index,
                texts[datum.index],
                None if failed else vector(datum, part.dtype),
                part.model_version,
                datum.tokens,
                datum.truncated,
                datum.cached,
                job_failed(datum.error) if datum.error is not None else None,
                datum.span,
            )


class _Entry:
    """A job of the window, from its first text to the moment its outcome is taken out."""

    __slots__ = ("call", "first", "size", "texts")

    def __init__(self, first: int, texts: list[str], size: int, call: PendingJob) -> None:
        self.first = first
        self.texts = texts
        self.size = size
        self.call = call


class JobStream:
    """Pulls texts while the window has space, sends them in jobs, and gives the outcomes out.

    A text is in the window from its pull until its job's outcome was taken out, so a slow taker stops the source.
    The client's room is held for the time of the job alone, so a slow taker never blocks other calls.
    """

    def __init__(
        self,
        begin: Callable[[list[str], int], PendingJob],
        finish: Callable[[PendingJob], None],
        room: WeightedSemaphore,
        *,
        batch_size: int,
        in_flight: int,
        in_flight_bytes: int,
        max_job_bytes: int,
        flush_after: float,
        ordered: bool,
    ) -> None:
        self._begin = begin
        self._finish = finish
        self._room = room
        self._batch_size = min(batch_size, in_flight)
        self._in_flight = in_flight
        self._in_flight_bytes = in_flight_bytes
        self._max_job_bytes = max_job_bytes
        self._flush_after = flush_after
        self._ordered = ordered
        self._pulled = 0
        self._texts = 0
        self._bytes = 0
        self._batch: list[str] = []
        self._batch_bytes = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._entries: dict[PendingJob, _Entry] = {}  # in the order of the source
        self._finished: deque[PendingJob] = deque()
        self._fault: BaseException | None = None
        self._space = asyncio.Event()
        self._news = asyncio.Event()
        self._fed = False

    async def jobs(
        self, source: Iterable[str] | AsyncIterable[str]
    ) -> AsyncGenerator[tuple[int, list[str], Outcome], None]:
        """(index of the first text, texts, outcome) of each job. A source that raises does so here, after the outcomes
        of what it gave before."""
        if isinstance(source, (str, bytes)) or not isinstance(source, (Iterable, AsyncIterable)):
            raise InvalidArgument(
                argument="texts", expected="an iterable of strings", got=type(source).__name__
            )
        feeder = asyncio.create_task(self._feed(source), name="embedq-stream")
        try:
            while (call := await self._next()) is not None:
                entry = self._entries.pop(call)
                yield entry.first, entry.texts, _outcome(call)
                self._texts -= len(entry.texts)
                self._bytes -= entry.size
                self._space.set()
            await feeder  # raises what the source raised
            if self._fault is not None:
                raise self._fault
        finally:
            feeder.cancel()
            await asyncio.wait([feeder])
            if not feeder.cancelled():
                feeder.exception()
            if self._flush_timer is not None:
                self._flush_timer.cancel()
            self._room.release(len(self._batch), self._batch_bytes)
            self._batch, self._batch_bytes = [], 0
            for call in self._entries:
                call.drop()  # its done callback gives the room back

    async def _next(self) -> PendingJob | None:
        """The next call to give out, when it has ended; None after the last."""
        while True:
            if self._ordered:
                call = next(iter(self._entries), None)
                if call is not None and call.future.done():
                    return call
            elif self._finished:
                return self._finished.popleft()
            if self._fed and not self._entries:
                return None
            self._news.clear()
            await self._news.wait()

    async def _feed(self, source: Iterable[str] | AsyncIterable[str]) -> None:
        try:
            if isinstance(source, AsyncIterable):
                async for text in source:
                    await self._take(text)
            else:
                for text in source:
                    await self._take(text)
                    if self._pulled % 64 == 0:
                        await asyncio.sleep(0)  # a fast source must not keep the loop to itself
            self._flush()
        finally:
            self._fed = True
            self._news.set()

    async def _take(self, text: str) -> None:
        """Into the batch, once the window and the client have room for it."""
        size = text_size(text, f"texts[{self._pulled}]", self._max_job_bytes)
        if self._batch and self._batch_bytes + size > self._max_job_bytes:
            self._flush()
        if not self._room.try_acquire(1, size):
            self._flush()
            await self._room.acquire(1, size)
        self._batch.append(text)
        self._batch_bytes += size
        self._pulled += 1
        self._texts += 1
        self._bytes += size
        if len(self._batch) >= self._batch_size:
            self._flush()
        elif self._flush_timer is None:
            loop = asyncio.get_running_loop()
            self._flush_timer = loop.call_later(self._flush_after, self._flush_in_time)
        while self._texts >= self._in_flight or self._bytes >= self._in_flight_bytes:
            self._flush()
            self._space.clear()
            await self._space.wait()

    def _flush_in_time(self) -> None:
        try:
            self._flush()
        except (
            EmbedError
        ) as error:  # the client was closed: the next pull would find out only when there is one
            self._fault = error
            self._fed = True
            self._news.set()

    def _flush(self) -> None:
        """Send the batch as one job."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        if not self._batch:
            return
        call = self._begin(self._batch, self._batch_bytes)
        self._entries[call] = _Entry(self._pulled - len(self._batch), self._batch, self._batch_bytes, call)
        self._batch, self._batch_bytes = [], 0
        call.future.add_done_callback(lambda _: self._ended(call))

    def _ended(self, call: PendingJob) -> None:
        self._finish(call)
        if not self._ordered:
            self._finished.append(call)
        self._news.set()


def _outcome(call: PendingJob) -> Outcome:
    """How a call ended. What is not ours, such as a bug, is raised."""
    error = call.future.exception()
    if error is None:
        return call.future.result()
    if isinstance(error, EmbedError):
        return error
    raise error
