"""EmbedClient: texts in, vectors out, over Kafka."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from embedq_sdk.embeddings import Chunk, Embeddings, FinishedJob, Vectors, assemble
from embedq_sdk.errors import ClientClosed, InvalidArgument
from embedq_sdk.job_options import (
    MAX_JOB_BYTES,
    Column,
    Errors,
    JobArguments,
    JobInputs,
    JobLimits,
    JobOptions,
    check_errors,
    checked_client_id,
    checked_count,
    checked_format,
    checked_id,
    checked_timeout,
    late,
    plain,
)
from embedq_sdk.result_reader import JobResult, read_results
from embedq_sdk.stream import Embedded, JobStream, StreamOptions
from embedq_sdk.transport import Deadline, JobRunner, KafkaConnection, KafkaTransport
from embedq_shared.codec import Format
from embedq_shared.messages import DEFAULT_MAX_INPUTS
from embedq_shared.topics import Topics, is_topic_name
from embedq_shared.weighted_semaphore import WeightedSemaphore

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_TIMEOUT_S: Final = 30.0


class _Life:
    """How a client is opened and closed, and what it has in hand."""

    # More than six parameters: what a client is told, checked; one caller.
    def __init__(
        self,
        connection: KafkaConnection,
        topics: Topics,
        instance: str | None,
        connect_timeout: float,
        in_flight: WeightedSemaphore,
        client: bytes,
        max_attempts: int | None,
    ) -> None:
        self._connection = connection
        self._topics = topics
        self._connect_timeout = connect_timeout
        self._transport = KafkaTransport(
            connection,
            topics,
            instance,
            deliver=lambda record: self._runner.deliver(record),
            broken=lambda fault: self._runner.break_down(fault),
            refused=lambda error: self._runner.refuse(error),
            moved=lambda: self._runner.move(),
        )
        self._runner = JobRunner(
            self._transport, self._transport.router, in_flight, client=client, max_attempts=max_attempts
        )

    async def open(self) -> Self:
        """Connect, as `async with` does at its beginning; `close` belongs to it. Does nothing where it is open.

        A client that could not be opened may be opened later; one that was closed may not.

        Raises:
            KafkaUnavailable, KafkaRefused, TopicMissing, ClientClosed, WrongEventLoop.
        """
        lifetime = self._runner.lifetime
        lifetime.claim()
        async with lifetime.turn:
            lifetime.claim()  # who had the turn before may have failed, or closed it
            if lifetime.is_open:
                return self
            try:
                await self._transport.open(self._connect_timeout)
            except BaseException:
                lifetime.failed()
                raise
            try:
                self._runner.open()
            except ClientClosed:
                await self._transport.close()
                raise
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; calls that still wait end with ClientClosed. Takes a few seconds at most, whatever Kafka does.

        Raises nothing that Kafka or its client say, so that leaving the block never hides the error that caused it.

        Raises:
            WrongEventLoop: the client is open in another event loop, where alone it can be closed.
        """
        self._runner.close()
        await self._transport.close()

    @property
    def in_flight(self) -> int:
        """Number of jobs that await a reply now."""
        return self._runner.awaiting_reply

    @property
    def answering(self) -> bool:
        """Whether Kafka answers this client: it is open, and the broker was heard a moment ago."""
        return self._runner.lifetime.is_open and not self._transport.silent

    @property
    def fault(self) -> BaseException | None:
        """Why the client stopped working by itself, which is a bug: every call ends with it. None: it works."""
        return self._runner.lifetime.fault

    @property
    def unclaimed_replies(self) -> int:
        """Number of replies so far that no call waited for: late ones, repeats, and other clients' on our partition."""
        return self._runner.unclaimed_replies

    @property
    def reply_partition(self) -> int:
        """The partition of the reply topic that this client reads."""
        return self._transport.reply_partition


class EmbedClient(_Life):
    """Sends jobs and awaits their results. Use it as an async context manager, or with `open` and `close`; in one event loop.

    What a job may ask for (`model`, `model_version`, `dimensions`, `dtype`, `input_type`, `instruction`, `truncate`, `chunk`,
    `metadata`, `lane`, `trace`, `client_id`) are keyword arguments of every call: see `JobArguments`.

    Args:
        servers: Kafka's address, "host:port", several separated by commas.
        topic_prefix: what the names of the service's topics begin with.
        connect_timeout: seconds that entering may take.
        max_in_flight_texts, max_in_flight_bytes: at once, over all calls; a call beyond waits, and at its deadline raises Overloaded.
        max_inputs, max_job_bytes: the most that one job holds; longer lists become several jobs.
        max_attempts: how often a job is sent at most when the service's answer is an error that may heal; None: until its deadline.
        instance: a stable name of this process, which chooses its reply partition; random by default.
        client_id: whose jobs these are: clients take turns, and those with one name take one's. Random by default.
        security: as aiokafka takes it; instead of `ssl_context` also PEM files (`ssl_cafile`, `ssl_certfile`, `ssl_keyfile`).

    Raises:
        InvalidArgument: a setting is wrong.
    """

    # More than six parameters: keyword-only settings of a public class, each with a default.
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
        max_attempts: int | None = None,
        instance: str | None = None,
        client_id: str | None = None,
        **security: Any,
    ) -> None:
        connection = KafkaConnection.of(servers, security)
        if not isinstance(topic_prefix, str) or not is_topic_name(f"{topic_prefix}.jobs.bulk"):
            raise InvalidArgument(
                argument="topic_prefix", expected="the beginning of a topic name", got=repr(topic_prefix)
            )
        self._limits = JobLimits(max_inputs=max_inputs, max_job_bytes=max_job_bytes)
        in_flight = WeightedSemaphore(
            checked_count("max_in_flight_texts", max_in_flight_texts),
            checked_count("max_in_flight_bytes", max_in_flight_bytes),
        )
        timeout = checked_timeout("connect_timeout", connect_timeout)
        client = checked_client_id(client_id)
        most = _checked_attempts(max_attempts)
        super().__init__(connection, Topics(topic_prefix), instance, timeout, in_flight, client, most)

    # -- embedding ----------------------------------------------------------------------------------------------------

    async def embed(
        self,
        texts: str | Sequence[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        **job: Unpack[JobArguments],
    ) -> Vectors:
        """The vector of a text, float32 (dimensions,), or of several, float32 (texts, dimensions), in their order.

        `dtype` is what travels: float16 and int8 save bytes and come back as float32; "binary" comes back as uint8
        with eight dimensions in each byte. A text over the model's limit fails unless `truncate` or `chunk=mean()` is
        given; for spans of a text there is `embed_chunks`. `timeout` is the deadline of the whole call in seconds. All
        vectors of one call come from one model: if a reload falls in between, the older part is requested once more.

        Raises:
            InvalidArgument: before anything was sent.
            JobFailed: the service refused the text, or all of them.
            PartialFailure: some texts failed; it holds the vectors of the others.
            DeadlineExceeded, KafkaUnavailable, KafkaRefused, Overloaded, MixedModelVersions, UnreadableReply.
            TopicMissing: the reply topic was deleted. Where it was made again meanwhile, nothing is raised.
            ClientClosed, ClientNotOpened, WrongEventLoop: the client cannot be used, or not here.
        """
        options = JobOptions(**job)
        if options.late:
            raise InvalidArgument(
                argument="chunk",
                expected="no value or mean(…); for late chunking use embed_chunks",
                got="late(…)",
            )
        timeout = checked_timeout("timeout", timeout)
        if isinstance(texts, str):
            found = await self._embed_one(texts, "texts", options, timeout)
            return found.vectors[0]  # type: ignore[no-any-return]
        return (await self._embed(texts, options, timeout, allow_mixed=False)).checked().vectors

    async def embed_chunks(
        self, text: str, *, timeout: float = DEFAULT_TIMEOUT_S, **job: Unpack[JobArguments]
    ) -> list[Chunk]:
        """A text's spans, which tile it, each with its vector, in order; `chunk` is `late()` by default.

        For several texts use `embed_detailed(texts, chunk=late()).chunks()` or `stream`. One job has at most 2,048 spans,
        unless the service is set otherwise. Deadline and errors are those of `embed`.
        """
        job.setdefault("chunk", late())
        options = JobOptions(**job)
        if not options.late:
            raise InvalidArgument(argument="chunk", expected="late(…)", got="mean(…) or none")
        found = await self._embed_one(text, "text", options, checked_timeout("timeout", timeout))
        return found.chunks()[0]

    async def embed_detailed(
        self,
        texts: str | Sequence[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """Like `embed`, with all that the service reported: model version, tokens, truncation, cache hits, timings.

        One text is a list of one. With errors="return" texts that failed are in `Embeddings.errors` instead of an
        exception; with allow_mixed=True vectors of several models are returned, each with its version.
        """
        options = JobOptions(**job)
        timeout = checked_timeout("timeout", timeout)
        check_errors(errors)
        texts = [texts] if isinstance(texts, str) else texts
        found = await self._embed(texts, options, timeout, allow_mixed=allow_mixed)
        return found if errors == "return" else found.checked()

    async def embed_raw(
        self,
        texts: Sequence[str] | Column,
        options: JobOptions,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_attempts: int | None = None,
    ) -> list[FinishedJob]:
        """The replies to a call as they came, for programs that pass vectors on: raw bytes of the dtype that was asked for,
        and int8 with its scale.

        A call is one job, but for one that is too large. All their vectors come from one model, as those of `embed` do. What
        the service says of a job, or of one of its inputs, is an outcome; other errors are raised. `max_attempts` is this
        call's own; with 1 an error that may heal is an outcome at once, for callers who decide what to send again.
        """
        inputs = self._limits.split(texts)
        most = _checked_attempts(max_attempts)
        deadline = Deadline.after(checked_timeout("timeout", timeout), max_attempts=most)
        finished = await self._runner.run(inputs, options, deadline)
        return await self._runner.of_one_model(finished, inputs, options, deadline)

    async def _embed_one(self, text: str, name: str, options: JobOptions, timeout: float) -> Embeddings:
        size = self._limits.size(text, name)
        finished = await self._runner.run([JobInputs([plain(text)], size)], options, Deadline.after(timeout))
        return assemble(finished).checked()

    async def _embed(
        self, texts: Sequence[str] | Column, options: JobOptions, timeout: float, *, allow_mixed: bool
    ) -> Embeddings:
        inputs = self._limits.split(texts)
        deadline = Deadline.after(timeout)
        finished = await self._runner.run(inputs, options, deadline)
        return await self._runner.merge(finished, inputs, options, deadline, allow_mixed=allow_mixed)

    # -- many texts ---------------------------------------------------------------------------------------------------

    async def embed_many(
        self,
        texts: Iterable[str] | AsyncIterable[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        batch_size: int = 32,
        in_flight: int = 4096,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """Many texts' vectors in one array, in order, with at most `in_flight` texts under way.

        `timeout` is the deadline of each job of `batch_size` texts, not of the whole call. As in `embed`, the part that an
        older model made is requested once more. Texts that failed are masked in PartialFailure's vectors, or with
        errors="return" listed in `Embeddings.errors`. For more than fits in memory there is `stream`.
        """
        options = JobOptions(**job)
        check_errors(errors)
        window = StreamOptions(
            limits=self._limits, timeout=timeout, batch_size=batch_size, in_flight=in_flight
        )
        inputs, finished = await JobStream(self._runner, options, window).collect(texts)
        deadline = Deadline.after(timeout)
        found = await self._runner.merge(finished, inputs, options, deadline, allow_mixed=allow_mixed)
        return found if errors == "return" else found.checked()

    async def stream(
        self,
        texts: Iterable[str] | AsyncIterable[str] | Column,
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
        failed raises its error; with errors="return" its item has `error` set and no vector. A reload in between shows
        in `model_version`: items before and after it can't be compared. Close an iterator that you leave early
        (`contextlib.aclosing`): that drops what is under way.
        """
        options = JobOptions(**job)
        check_errors(errors)
        window = StreamOptions(
            limits=self._limits,
            timeout=timeout,
            batch_size=batch_size,
            in_flight=in_flight,
            in_flight_bytes=in_flight_bytes,
            flush_after=flush_after,
            ordered=ordered,
        )
        async with aclosing(JobStream(self._runner, options, window).jobs(texts)) as ended:
            async for each in ended:
                for item in each.items():
                    if item.error is not None and errors == "raise":
                        raise item.error
                    yield item

    # -- jobs whose results go to the results topic -------------------------------------------------------------------

    async def submit(
        self,
        texts: str | Sequence[str] | Column,
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
        format = checked_format(format)
        job_id = uuid.uuid4().hex if id is None else checked_id(id)
        inputs, size = self._limits.one_job(texts)
        await self._runner.submit(inputs, size, options, id=job_id, format=format, timeout=timeout)
        return job_id

    def results(
        self,
        *,
        group: str | None = None,
        from_beginning: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[JobResult, None]:
        """Results of submitted jobs, from the results topic, as `JobResult`, without end.

        Parts are joined and repeats dropped, by id. With a `group`, several readers share the topic and continue where
        they stopped: a result counts as read when the next one is requested. Without, this reader sees everything, from
        now on or from the beginning. With a `timeout`, iteration ends when nothing came for that many seconds. It waits
        while Kafka is down; only the first connection raises KafkaUnavailable.
        """
        if timeout is not None:
            timeout = checked_timeout("timeout", timeout)
        return read_results(
            self._connection,
            self._topics.results,
            group=group,
            from_beginning=from_beginning,
            connect_timeout=self._connect_timeout,
            idle=timeout,
        )


def _checked_attempts(most: int | None) -> int | None:
    return None if most is None else checked_count("max_attempts", most)
