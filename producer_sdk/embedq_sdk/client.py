"""EmbedClient: texts in, vectors out, over Kafka."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack

import msgspec

from embedq_sdk.embeddings import (
    Chunk,
    Embeddings,
    Outcome,
    Vectors,
    assemble,
    mixed,
    read_reply,
)
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    InvalidArgument,
    JobFailed,
    KafkaUnavailable,
    Overloaded,
    UnreadableReply,
)
from embedq_sdk.job_options import (
    JobArguments,
    JobOptions,
    checked_count,
    checked_id,
    checked_texts,
    checked_timeout,
    late,
    split,
    text_size,
)
from embedq_sdk.result_reader import JobResult, read_results
from embedq_sdk.stream import Embedded, JobStream, items
from embedq_sdk.transport.job_sender import Sender
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.pending_jobs import PendingJob, PendingReplies, backoff, settle, worth_retrying
from embedq_sdk.transport.reply_reader import ReplyReader
from embedq_shared import topics as names
from embedq_shared.codec import CONTENT_TYPES, Format
from embedq_shared.headers import Header, reply_partition_bytes
from embedq_shared.messages import DEFAULT_MAX_INPUTS
from embedq_shared.weighted_semaphore import WeightedSemaphore

if TYPE_CHECKING:
    from types import TracebackType

Errors = Literal["raise", "return"]

DEFAULT_TIMEOUT_S: Final = 30.0
MAX_JOB_BYTES: Final = 900_000
_MSGPACK_TYPE: Final = names.MSGPACK.encode()
_CORRELATION: Final = names.CORRELATION[0]
_SILENT_S: Final = 1.2
"""A broker answers our fetch every half second: when it has not for this long, it is gone."""


class EmbedClient:
    """Sends jobs and awaits their results. Use it as an async context manager, in one event loop.

    What a job may ask for (`model`, `dimensions`, `dtype`, `input_type`, `instruction`, `truncate`, `chunk`, `metadata`,
    `lane`, `trace`) are keyword arguments of every call: see `JobArguments`.

    Args:
        servers: Kafka's address, "host:port", several with commas.
        topic_prefix: what the service's topics begin with.
        connect_timeout: seconds that entering may take.
        max_in_flight_texts, max_in_flight_bytes: how much this client has under way at once, over all calls; a call
            beyond that waits its turn within its own deadline.
        max_inputs, max_job_bytes: what one job holds at most; longer lists become several jobs.
        instance: a stable name of this process, which chooses its reply partition; random if absent.
        security: `security_protocol`, `ssl_context` and `sasl_…`, as aiokafka takes them.
    """

    def __init__(
        self,
        servers: str | list[str],
        *,
        topic_prefix: str = "embed",
        connect_timeout: float = 10.0,
        max_in_flight_texts: int = 16_384,
        max_in_flight_bytes: int = 64 << 20,
        max_inputs: int = DEFAULT_MAX_INPUTS,
        max_job_bytes: int = MAX_JOB_BYTES,
        instance: str | None = None,
        **security: Any,
    ) -> None:
        self._servers = KafkaConnection.of(servers, security)
        if not isinstance(topic_prefix, str) or not names.is_topic_name(f"{topic_prefix}.jobs.bulk"):
            raise InvalidArgument(
                argument="topic_prefix", expected="the beginning of a topic name", got=repr(topic_prefix)
            )
        self._topics = names.Topics(topic_prefix)
        self._connect_timeout = checked_timeout("connect_timeout", connect_timeout)
        self._max_inputs = checked_count("max_inputs", max_inputs)
        self._max_job_bytes = checked_count("max_job_bytes", max_job_bytes)
        if max_job_bytes > MAX_JOB_BYTES:
            raise InvalidArgument(
                argument="max_job_bytes", expected=f"at most {MAX_JOB_BYTES:,}", got=f"{max_job_bytes:,}"
            )
        self._room = WeightedSemaphore(
            checked_count("max_in_flight_texts", max_in_flight_texts),
            checked_count("max_in_flight_bytes", max_in_flight_bytes),
        )
        self._instance = (instance or uuid.uuid4().hex).encode()
        self._book = PendingReplies()
        self._sender = Sender(self._servers)
        self._inbox = ReplyReader(self._servers, self._topics.replies, self._partition_of, self._deliver)
        self._tasks: list[asyncio.Task[None]] = []
        self._submitted: set[PendingJob] = set()
        self._open = False
        self._used = False
        self._fault: BaseException | None = None
        self._reply_headers: tuple[Header, ...] = ()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._used:
            raise ClientClosed()
        self._used = True
        end = time.monotonic() + self._connect_timeout
        await self._inbox.open([*self._topics.lanes, self._topics.replies], self._connect_timeout)
        try:
            await self._sender.open(max(0.1, end - time.monotonic()))
        except BaseException:
            await self._inbox.close()
            raise
        self._reply_headers = (
            (names.REPLY_TOPIC[0], self._topics.replies.encode()),
            (names.REPLY_PARTITION[0], reply_partition_bytes(self._inbox.partition)),
            (names.CONTENT_TYPE, _MSGPACK_TYPE),
        )
        for name, work in (("embedq-inbox", self._inbox.run()), ("embedq-sender", self._sender.run())):
            task = asyncio.create_task(work, name=name)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; calls still waiting end with ClientClosed. Takes a few seconds at most, whatever Kafka does."""
        self._open = False
        for call in (*self._book.calls(), *self._submitted):
            call.fail(ClientClosed())
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks.clear()
            await asyncio.gather(self._sender.close(), self._inbox.close())

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A task that ends by itself is our bug; its error reaches whoever waits, now or later."""
        if task.cancelled():
            return
        self._fault = task.exception()
        for call in (*self._book.calls(), *self._submitted):
            call.fail(self._closed())

    def _closed(self) -> Exception:
        if self._fault is None:
            return ClientClosed()
        broken = EmbedError()
        broken.__cause__ = self._fault
        broken.add_note(f"the client stopped working ({self._fault!r}). This is a bug.")
        return broken

    @property
    def in_flight(self) -> int:
        """Jobs that await a reply now."""
        return len(self._book)

    @property
    def unclaimed_replies(self) -> int:
        """Replies read so far that nobody here waited for: late ones, repeats, and other clients' on our partition."""
        return self._book.unknown

    @property
    def reply_partition(self) -> int:
        """The partition of the reply topic that this client reads."""
        return self._inbox.partition

    def _partition_of(self, partitions: int) -> int:
        return zlib.crc32(self._instance) % partitions

    # -- embedding ----------------------------------------------------------------------------------------------------

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        **job: Unpack[JobArguments],
    ) -> Vectors:
        """The vector of a text, float32 (dimensions,), or of several, float32 (texts, dimensions), in their order.

        `dtype` is what travels: float16 and int8 save bytes and come back as float32; "binary" comes back as uint8
        with eight dimensions in each byte. A text over the model's limit fails unless `truncate` or `chunk=mean()` is
        given; for spans of a text there is `embed_chunks`. `timeout` is the deadline of the whole call in seconds. All
        vectors of one call come from one model: if a reload falls in between, the older part is asked for once more.

        Raises:
            InvalidArgument: before anything was sent.
            JobFailed: the service refused the text, or every one of them.
            PartialFailure: some texts failed; it holds the vectors of the others.
            DeadlineExceeded, KafkaUnavailable, Overloaded, MixedModelVersions, ClientClosed.
        """
        options = JobOptions(**job)
        if options.late:
            raise InvalidArgument(
                argument="chunk",
                expected="none or mean(…); late chunks come from embed_chunks",
                got="late(…)",
            )
        timeout = checked_timeout("timeout", timeout)
        if isinstance(texts, str):
            size = text_size(texts, "texts", self._max_job_bytes)
            found = assemble(await self._ask([[texts]], [size], options, timeout))
            return found.checked().vectors[0]  # type: ignore[no-any-return]
        return (await self._embed(texts, options, timeout, allow_mixed=False)).checked().vectors

    async def embed_chunks(
        self, text: str, *, timeout: float = DEFAULT_TIMEOUT_S, **job: Unpack[JobArguments]
    ) -> list[Chunk]:
        """A text's spans, which tile it, each with its vector, in order; `chunk` is `late()` unless it is given.

        For several texts there are `embed_detailed(texts, chunk=late()).chunks()` and `stream`. One job has at most 2,048
        spans, unless the service is set otherwise. Deadline and errors are those of `embed`.
        """
        job.setdefault("chunk", late())
        options = JobOptions(**job)
        if not options.late:
            raise InvalidArgument(argument="chunk", expected="late(…)", got="mean(…) or none")
        timeout = checked_timeout("timeout", timeout)
        size = text_size(text, "text", self._max_job_bytes)
        found = assemble(await self._ask([[text]], [size], options, timeout))
        return found.checked().chunks()[0]

    async def embed_detailed(
        self,
        texts: str | Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """As `embed`, with all that the service said: model version, tokens, cut, cached, timings. One text is a list of
        one. With errors="return" texts that failed are in `Embeddings.errors` instead of an exception; with
        allow_mixed=True vectors of several models are returned, each with its version.
        """
        options = JobOptions(**job)
        timeout = checked_timeout("timeout", timeout)
        _checked_errors(errors)
        listed = [texts] if isinstance(texts, str) else texts
        found = await self._embed(listed, options, timeout, allow_mixed=allow_mixed)
        return found if errors == "return" else found.checked()

    async def _embed(
        self, texts: Sequence[str], options: JobOptions, timeout: float, *, allow_mixed: bool
    ) -> Embeddings:
        listed, sizes = checked_texts(texts, self._max_job_bytes)
        cuts = list(split(sizes, max_inputs=self._max_inputs, max_bytes=self._max_job_bytes))
        jobs = [listed[start:end] for start, end in cuts]
        weights = [sum(sizes[start:end]) for start, end in cuts]
        return await self._settled(jobs, weights, options, timeout, allow_mixed=allow_mixed)

    async def _settled(
        self,
        jobs: list[list[str]],
        weights: list[int],
        options: JobOptions,
        timeout: float,
        *,
        allow_mixed: bool,
    ) -> Embeddings:
        """All jobs' vectors from one model: what an older one made is asked for once more."""
        end = asyncio.get_running_loop().time() + timeout
        outcomes = await self._ask(jobs, weights, options, timeout)
        return await self._one_version(outcomes, jobs, weights, options, end, allow_mixed=allow_mixed)

    async def _one_version(
        self,
        outcomes: list[tuple[int, Outcome]],
        jobs: Sequence[Sequence[str]],
        weights: Sequence[int],
        options: JobOptions,
        end: float,
        *,
        allow_mixed: bool,
    ) -> Embeddings:
        """`outcomes` as one array; where they came from several models, after asking once more for the others' part.

        The last job was sent last and its model is taken for the newest; only one round, so a call never chases a
        service that keeps changing.
        """
        versions = [_version(outcome) for _, outcome in outcomes]
        newest = next((version for version in reversed(versions) if version is not None), None)
        old = [n for n, version in enumerate(versions) if version is not None and version != newest]
        if old and not allow_mixed:
            left = max(0.001, end - asyncio.get_running_loop().time())
            again = await self._ask([list(jobs[n]) for n in old], [weights[n] for n in old], options, left)
            for n, outcome in zip(old, again, strict=True):
                outcomes[n] = outcome
            versions = [_version(outcome) for _, outcome in outcomes]
            if len({version for version in versions if version is not None}) > 1:
                raise mixed(
                    [v for v, (count, _) in zip(versions, outcomes, strict=True) for _ in range(count)]
                )
        return assemble(outcomes)

    async def _ask(
        self, jobs: list[list[str]], weights: list[int], options: JobOptions, timeout: float
    ) -> list[tuple[int, Outcome]]:
        """Every job's outcome. What the service said about a job is an outcome; everything else is raised."""
        end = asyncio.get_running_loop().time() + timeout
        calls: list[PendingJob] = []
        try:
            for texts, size in zip(jobs, weights, strict=True):
                if not self._room.try_acquire(len(texts), size):
                    await self._wait_for_room(len(texts), size, end, timeout)
                try:
                    call = self._begin(texts, size, options, end, timeout)
                except BaseException:
                    self._room.release(len(texts), size)
                    raise
                calls.append(call)
            outcomes: list[tuple[int, Outcome]] = []
            for call in calls:
                try:
                    outcomes.append((call.count, await call.future))
                except JobFailed as error:
                    outcomes.append((call.count, error))
            return outcomes
        finally:
            for call in calls:
                self._finish(call)

    async def _wait_for_room(self, texts: int, size: int, end: float, timeout: float) -> None:
        try:
            async with asyncio.timeout_at(end):
                await self._room.acquire(texts, size)
        except TimeoutError:
            texts, size = self._room.held
            raise Overloaded(texts=texts, size=size, timeout=timeout) from None

    def _begin(
        self, texts: list[str], size: int, options: JobOptions, end: float, timeout: float
    ) -> PendingJob:
        """Send one job and expect its reply until `end` (the loop's clock). The caller has room for it."""
        if not self._open or self._fault is not None:
            raise self._closed()
        loop = asyncio.get_running_loop()
        correlation = os.urandom(16)
        headers: list[Header] = [
            (_CORRELATION, correlation),
            *self._reply_headers,
            (names.DEADLINE, b"%d" % int((time.time() + end - loop.time()) * 1000)),
        ]
        if options.trace is not None:
            headers.append((names.TRACE[0], options.trace.encode()))
        call = PendingJob(
            loop.create_future(),
            topic=self._topics.bulk if options.lane == "bulk" else self._topics.jobs,
            value=options.encode(texts[0] if len(texts) == 1 else texts, correlation.hex()),
            headers=headers,
            correlation=correlation,
            count=len(texts),
            size=size,
            timeout=timeout,
        )
        call.timer = loop.call_at(end, self._too_late, call)
        self._book.open(call)
        self._sender.put(call)
        return call

    def _finish(self, call: PendingJob) -> None:
        """Nobody waits for the call any more; its room is free."""
        self._book.close(call)
        call.drop()
        self._room.release(call.count, call.size)

    def _too_late(self, call: PendingJob) -> None:
        """A call's deadline: say what is likely wrong."""
        silent = self._inbox.silent_for(time.time())
        if self._sender.broken or silent > _SILENT_S:
            progress = "took the job, then fell silent" if call.acknowledged else "did not take the job"
            call.fail(self._servers.unavailable(f"it {progress} within {call.timeout:g} s"))
        else:
            progress = "the job is in Kafka" if call.acknowledged else "the job is on its way to Kafka"
            call.fail(DeadlineExceeded(timeout=call.timeout, progress=progress))

    def _deliver(self, record: Any) -> None:
        """A record of our reply partition."""
        correlation = content_type = None
        for name, value in record.headers:
            if name == _CORRELATION:
                correlation = value
            elif name == names.CONTENT_TYPE:
                content_type = value
        call = self._book.find(correlation)
        if call is None:
            return
        try:
            outcome = settle(call, read_reply(record.value or b"", msgpack=content_type == _MSGPACK_TYPE))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            call.fail(UnreadableReply(detail=f"{type(error).__name__} at offset {record.offset}"))
            return
        if outcome is None:
            return
        if worth_retrying(outcome) and self._again(call):
            return
        if isinstance(outcome, list):
            call.future.set_result(outcome)
        else:
            call.fail(outcome)

    def _again(self, call: PendingJob) -> bool:
        """Send the same job once more after a pause, if that can still help."""
        loop = asyncio.get_running_loop()
        pause = backoff(call.attempt)
        assert call.timer is not None
        if loop.time() + pause >= call.timer.when():
            return False
        call.attempt += 1
        call.joiner = None
        call.acknowledged = False
        if call.waiting is not None:
            call.waiting.cancel()
        call.waiting = loop.call_later(pause, self._sender.put, call)
        return True

    # -- many texts ---------------------------------------------------------------------------------------------------

    async def embed_many(
        self,
        texts: Iterable[str],
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        batch_size: int = 32,
        in_flight: int = 4096,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """Many texts' vectors in one array, in order, with at most `in_flight` texts under way.

        `timeout` is the deadline of each job of `batch_size` texts, not of the whole. As in `embed`, the part that an
        older model made is asked for once more. Texts that failed are masked in PartialFailure's vectors, or with
        errors="return" listed in `Embeddings.errors`. For more than fits in memory there is `stream`.
        """
        options = JobOptions(**job)
        _checked_errors(errors)
        stream = self._job_stream(options, timeout, batch_size, in_flight, ordered=True)
        jobs: list[list[str]] = []
        outcomes: list[tuple[int, Outcome]] = []
        async with aclosing(stream.jobs(texts)) as done:
            async for _, batch, outcome in done:
                if isinstance(outcome, KafkaUnavailable | ClientClosed):
                    raise outcome
                jobs.append(batch)
                outcomes.append((len(batch), outcome))
        if not jobs:
            raise InvalidArgument(argument="texts", expected="at least one text", got="none")
        weights = [sum(map(len, job)) for job in jobs]
        end = asyncio.get_running_loop().time() + timeout
        found = await self._one_version(outcomes, jobs, weights, options, end, allow_mixed=allow_mixed)
        return found if errors == "return" else found.checked()

    async def stream(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        batch_size: int = 32,
        in_flight: int = 1024,
        in_flight_bytes: int = 8 << 20,
        flush_after: float = 0.02,
        ordered: bool = True,
        errors: Errors = "raise",
        **job: Unpack[JobArguments],
    ) -> AsyncGenerator[Embedded, None]:
        """Vectors of an endless or lazy source, as `Embedded` items with index, text, vector and model version.

        At most `in_flight` texts and `in_flight_bytes` are pulled and not yet taken out; the source is not touched
        beyond that. `batch_size` texts travel in one job; fewer if the source pauses for `flush_after` seconds.
        `timeout` is each job's deadline. Items come in the source's order, with ordered=False as they finish. A text that
        failed raises its error, with errors="return" its item has `error` set and no vector. A reload in between shows
        in `model_version`: items before and after it can't be compared. Close an iterator that you leave early
        (`contextlib.aclosing`): that drops what is under way.
        """
        options = JobOptions(**job)
        _checked_errors(errors)
        jobs = self._job_stream(
            options, timeout, batch_size, in_flight, in_flight_bytes, flush_after, ordered=ordered
        )
        async with aclosing(jobs.jobs(texts)) as done:
            async for first, batch, outcome in done:
                for item in items(first, batch, outcome):
                    if item.error is not None and errors == "raise":
                        raise item.error
                    yield item

    def _job_stream(
        self,
        options: JobOptions,
        timeout: float,
        batch_size: int,
        in_flight: int,
        in_flight_bytes: int = 32 << 20,
        flush_after: float = 0.02,
        *,
        ordered: bool,
    ) -> JobStream:
        timeout = checked_timeout("timeout", timeout)
        loop = asyncio.get_running_loop()

        def begin(texts: list[str], size: int) -> PendingJob:
            return self._begin(texts, size, options, loop.time() + timeout, timeout)

        return JobStream(
            begin,
            self._finish,
            self._room,
            batch_size=min(checked_count("batch_size", batch_size), self._max_inputs),
            in_flight=checked_count("in_flight", in_flight),
            in_flight_bytes=checked_count("in_flight_bytes", in_flight_bytes),
            max_job_bytes=self._max_job_bytes,
            flush_after=checked_timeout("flush_after", flush_after),
            ordered=ordered,
        )

    # -- jobs whose results go elsewhere ------------------------------------------------------------------------------

    async def submit(
        self,
        texts: str | Sequence[str],
        *,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        format: Format = "msgpack",
        **job: Unpack[JobArguments],
    ) -> str:
        """Publish one job whose result goes to the results topic; returns its id once Kafka has acknowledged it.

        `timeout` bounds that acknowledgement, not the work: the job has no deadline. `format` is how job and result are
        written. When KafkaUnavailable is raised the job may still be there: submit it again under the same id, and
        readers drop the repeat.

        Raises:
            InvalidArgument, KafkaUnavailable, Overloaded, ClientClosed.
        """
        job.setdefault("lane", "bulk")
        options = JobOptions(**job)
        timeout = checked_timeout("timeout", timeout)
        if not isinstance(format, str) or format not in CONTENT_TYPES:
            raise InvalidArgument(argument="format", expected="one of json, msgpack", got=repr(format))
        job_id = uuid.uuid4().hex if id is None else checked_id(id)
        if isinstance(texts, str):
            count, size = 1, text_size(texts, "texts", self._max_job_bytes)
        else:
            texts, sizes = checked_texts(texts, self._max_job_bytes)
            count, size = len(texts), sum(sizes)
            if count > self._max_inputs or size > self._max_job_bytes:
                raise InvalidArgument(
                    argument="texts",
                    expected=f"at most {self._max_inputs:,} texts and {self._max_job_bytes:,} bytes, one job's worth",
                    got=f"{count:,} texts and {size:,} bytes",
                )
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        if not self._room.try_acquire(count, size):
            await self._wait_for_room(count, size, end, timeout)
        try:
            if not self._open or self._fault is not None:
                raise self._closed()
            headers: list[Header] = [(names.CONTENT_TYPE, CONTENT_TYPES[format].encode())]
            if options.trace is not None:
                headers.append((names.TRACE[0], options.trace.encode()))
            call = PendingJob(
                loop.create_future(),
                topic=self._topics.bulk if options.lane == "bulk" else self._topics.jobs,
                value=options.encode(texts, job_id, format),
                headers=headers,
                correlation=b"",
                count=count,
                size=size,
                timeout=timeout,
                awaits_reply=False,
            )
        except BaseException:
            self._room.release(count, size)
            raise
        call.timer = loop.call_at(end, self._not_acknowledged, call)
        self._submitted.add(call)
        self._sender.put(call)
        try:
            await call.future
        finally:
            self._submitted.discard(call)
            call.drop()
            self._room.release(count, size)
        return job_id

    def _not_acknowledged(self, call: PendingJob) -> None:
        call.fail(self._servers.unavailable(f"it did not acknowledge the job within {call.timeout:g} s"))

    def results(
        self,
        *,
        group: str | None = None,
        from_beginning: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[JobResult, None]:
        """Results of submitted jobs, from the results topic, as `JobResult`, without end.

        Parts are joined and repeats dropped, by id. With a `group`, several readers share the topic and go on where they
        stopped: a result counts as read when the next one is asked for. Without, this reader sees everything, from now
        on or from the beginning. With a `timeout`, iteration ends when nothing came for that many seconds. It waits
        while Kafka is down; only the first connection raises KafkaUnavailable.
        """
        if timeout is not None:
            timeout = checked_timeout("timeout", timeout)
        return read_results(
            self._servers,
            self._topics.results,
            group=group,
            from_beginning=from_beginning,
            connect_timeout=self._connect_timeout,
            idle=timeout,
        )


def _version(outcome: Outcome) -> str | None:
    return outcome[0].model_version if isinstance(outcome, list) else None


def _checked_errors(errors: object) -> None:
    if errors not in ("raise", "return"):
        raise InvalidArgument(argument="errors", expected="one of raise, return", got=repr(errors))
