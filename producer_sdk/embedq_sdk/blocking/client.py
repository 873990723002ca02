"""EmbedClient without async: the same calls, which return when they are done."""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

from embedq_sdk.blocking.session import LEAVE_S, Call, Session, Steps, making, outcome
from embedq_sdk.blocking.sources import CallersSource, readable
from embedq_sdk.client import DEFAULT_TIMEOUT_S
from embedq_sdk.client import EmbedClient as AsyncEmbedClient
from embedq_sdk.embeddings import Chunk, Embeddings, FinishedJob, Vectors
from embedq_sdk.errors import ClientClosed
from embedq_sdk.job_options import (
    MAX_JOB_BYTES,
    Column,
    Errors,
    JobArguments,
    JobOptions,
    check_errors,
)
from embedq_sdk.result_reader import JobResult
from embedq_sdk.stream import Embedded, JobStream, StreamedJob, StreamOptions
from embedq_shared.codec import Format
from embedq_shared.messages import DEFAULT_MAX_INPUTS
from embedq_shared.secret import Secret

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")

_STAYS: Final = ("sasl_plain_password", "ssl_context")
"""Settings that are not sent to another process: what is pickled is stored."""


class _LoopClient(AsyncEmbedClient):
    """The async client, with streams job by job: one change of threads for each job, not for each text."""

    def jobs(self, texts: Any, options: JobOptions, **window: Any) -> AsyncGenerator[StreamedJob, None]:
        """The jobs of a source as they end."""
        return JobStream(self._runner, options, StreamOptions(limits=self._limits, **window)).jobs(texts)


class _Life:
    """How a client is opened, closed, copied, and reached in its event loop."""

    def __init__(self, servers: str | list[str], settings: dict[str, Any]) -> None:
        self._servers = servers
        self._settings = settings
        self._unused: _LoopClient | None = _LoopClient(servers, **settings)  # refuses wrong settings here
        self._session: Session[_LoopClient] | None = None
        self._closed = False

    def open(self) -> Self:
        """Connect now instead of at the first call. Does nothing where it is connected.

        Raises:
            KafkaUnavailable, KafkaRefused, TopicMissing, ClientClosed.
        """
        self._call(_nothing)
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop; calls that still wait in other threads end with ClientClosed. Takes a few seconds at most, whatever Kafka does."""
        with making():
            self._closed = True
            session = self._session
        if session is not None:
            session.end()
            session.join(LEAVE_S)

    @property
    def in_flight(self) -> int:
        """Number of jobs that await a reply now."""
        session = self._session
        return 0 if session is None or session.inherited else session.client.in_flight

    @property
    def answering(self) -> bool:
        """Whether Kafka answers this client: it is connected, and the broker was heard a moment ago."""
        session = self._session
        return session is not None and not session.inherited and session.client.answering

    @property
    def fault(self) -> BaseException | None:
        """Why the client stopped working by itself, which is a bug: every call ends with it. None: it works."""
        session = self._session
        return None if session is None or session.inherited else session.client.fault

    @property
    def unclaimed_replies(self) -> int:
        """Number of replies so far that no call waited for: late ones, repeats, and other clients' on our partition."""
        session = self._session
        return 0 if session is None or session.inherited else session.client.unclaimed_replies

    @property
    def reply_partition(self) -> int:
        """The partition of the reply topic that this client reads; connects where it is not connected."""
        self.open()
        return self._here().client.reply_partition

    def __reduce__(self) -> tuple[Any, ...]:
        """Its settings; the copy connects by itself."""
        for name in _STAYS:
            if self._settings.get(name) is not None:
                raise TypeError(
                    f"an EmbedClient with `{name}` cannot be pickled, since what is pickled is stored: make it where it is "
                    "used, in the function that runs there"
                )
        return _remade, (type(self), self._servers, self._settings)

    def begin(self, work: Callable[[AsyncEmbedClient], Awaitable[T]]) -> Future[T]:
        """Begin calls of the async client without waiting: `client.begin(lambda embedq: embedq.embed("text"))`.

        `result()` of the future waits in any thread, `await asyncio.wrap_future(…)` in any event loop; cancelling it cancels
        the calls.

        Raises:
            ClientClosed.
        """
        session = self._here()
        return session.begin_open(lambda: self._begun(session, work))

    async def _begun(
        self, session: Session[_LoopClient], work: Callable[[AsyncEmbedClient], Awaitable[T]]
    ) -> T:
        """What is under way keeps the client: one that nobody holds is closed."""
        return await work(session.client)

    def _call(
        self, work: Callable[[AsyncEmbedClient], Awaitable[T]], source: CallersSource | None = None
    ) -> T:
        session = self._here()
        call = Call(work)
        try:
            future = session.begin_open(lambda: self._begun(session, call.run))
            return outcome(future) if source is None else source.read_until(future)
        except BaseException:
            session.tell(call.leave)
            raise

    def _iterated(
        self,
        session: Session[_LoopClient],
        begin: Callable[[Callable[[], Coroutine[Any, Any, T | None]]], Future[T | None]],
        items: AsyncGenerator[T, None],
        source: CallersSource | None = None,
    ) -> Generator[T, None, None]:
        """What an async generator gives, a step for each item that is asked for, and its end when the caller has enough."""
        steps = Steps(items)
        try:
            while True:
                if source is not None:
                    source.top_up()
                step = begin(steps.next)
                item = outcome(step) if source is None else source.read_until(step)
                if item is None:
                    return
                yield item
        finally:
            session.finish(steps.close)

    def _here(self) -> Session[_LoopClient]:
        """This process's session: made at the first call, and in a child at its first one."""
        session = self._session
        if session is not None and not session.inherited and not self._closed:
            return session
        with making():
            if self._closed:
                raise ClientClosed()
            session = self._session
            if session is None or session.inherited:
                client = self._unused or _LoopClient(self._servers, **self._settings)
                self._unused = None
                self._session = session = Session(client)
                weakref.finalize(self, session.end).atexit = False
            return session


class EmbedClient(_Life):
    """Sends jobs and waits for their results. Use it as a context manager, or as it is: it connects at its first call.

    The calls, their arguments and their errors are those of `embedq_sdk.EmbedClient`, which lives in an event loop of its own in
    a background thread. So it may be used where an event loop runs, such as a notebook's cell, and by many threads at once: they
    share one connection. After a fork the child connects by itself, and a pickled client, as Spark's and Ray's functions
    carry it along, connects where it is used; all of them count as one client when the service gives clients their turns. A
    client that has a password or an `ssl_context` is not pickled: make it where it is used.

    A program may end without `close`. Ctrl-C leaves a call at once.

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
        if isinstance(password := security.get("sasl_plain_password"), str):
            security["sasl_plain_password"] = Secret(password)
        settings = {
            "topic_prefix": topic_prefix,
            "connect_timeout": connect_timeout,
            "max_in_flight_texts": max_in_flight_texts,
            "max_in_flight_bytes": max_in_flight_bytes,
            "max_inputs": max_inputs,
            "max_job_bytes": max_job_bytes,
            "max_attempts": max_attempts,
            "instance": instance,
            "client_id": uuid.uuid4().hex if client_id is None else client_id,
            **security,
        }
        super().__init__(servers, settings)

    # -- embedding ----------------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: str | Sequence[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        **job: Unpack[JobArguments],
    ) -> Vectors:
        """The vector of a text, float32 (dimensions,), or of several, float32 (texts, dimensions), in their order.

        `timeout` is the deadline of the whole call in seconds, after connecting. Options and errors are the async client's.
        """
        return self._call(lambda client: client.embed(texts, timeout=timeout, **job))

    def embed_chunks(
        self, text: str, *, timeout: float = DEFAULT_TIMEOUT_S, **job: Unpack[JobArguments]
    ) -> list[Chunk]:
        """A text's spans, which tile it, each with its vector, in order; `chunk` is `late()` by default."""
        return self._call(lambda client: client.embed_chunks(text, timeout=timeout, **job))

    def embed_detailed(
        self,
        texts: str | Sequence[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """Like `embed`, with all that the service reported: model version, tokens, truncation, cache hits, timings."""
        return self._call(
            lambda client: client.embed_detailed(
                texts, timeout=timeout, errors=errors, allow_mixed=allow_mixed, **job
            )
        )

    def embed_raw(
        self,
        texts: Sequence[str] | Column,
        options: JobOptions,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_attempts: int | None = None,
    ) -> list[FinishedJob]:
        """The replies to a call as they came, for programs that pass vectors on."""
        return self._call(
            lambda client: client.embed_raw(texts, options, timeout=timeout, max_attempts=max_attempts)
        )

    # -- many texts ---------------------------------------------------------------------------------------------------

    def embed_many(
        self,
        texts: Iterable[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        batch_size: int = 32,
        in_flight: int = 4096,
        errors: Errors = "raise",
        allow_mixed: bool = False,
        **job: Unpack[JobArguments],
    ) -> Embeddings:
        """Many texts' vectors in one array, in order, with at most `in_flight` texts under way.

        A lazy source is read in the caller's thread. `timeout` is the deadline of each job of `batch_size` texts.
        """
        given, source = readable(texts, batch_size)
        return self._call(
            lambda client: client.embed_many(
                given,
                timeout=timeout,
                batch_size=batch_size,
                in_flight=in_flight,
                errors=errors,
                allow_mixed=allow_mixed,
                **job,
            ),
            source,
        )

    def stream(
        self,
        texts: Iterable[str] | Column,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        batch_size: int = 32,
        in_flight: int = 1024,
        in_flight_bytes: int = 8 << 20,
        flush_after: float = 0.02,
        ordered: bool = True,
        errors: Errors = "raise",
        **job: Unpack[JobArguments],
    ) -> Generator[Embedded, None, None]:
        """Vectors of an endless or lazy source, as `Embedded` items with index, text, vector and model version.

        The source is read in the caller's thread, between two items, so it may use what belongs to that thread. While it keeps
        its reader waiting, so do the items that have come meanwhile: for texts that come one by one, with pauses, use `embed`.
        The bounds and options are the async client's.
        """
        options = JobOptions(**job)
        check_errors(errors)
        given, source = readable(texts, batch_size)
        session = self._here()
        jobs = session.client.jobs(
            given,
            options,
            timeout=timeout,
            batch_size=batch_size,
            in_flight=in_flight,
            in_flight_bytes=in_flight_bytes,
            flush_after=flush_after,
            ordered=ordered,
        )
        return self._items(self._iterated(session, session.begin_open, jobs, source), errors)

    # -- jobs whose results go to the results topic -------------------------------------------------------------------

    def submit(
        self,
        texts: str | Sequence[str] | Column,
        *,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        format: Format = "msgpack",
        **job: Unpack[JobArguments],
    ) -> str:
        """Publish one job whose result goes to the results topic; returns its id once Kafka has acknowledged it."""
        return self._call(lambda client: client.submit(texts, id=id, timeout=timeout, format=format, **job))

    def results(
        self,
        *,
        group: str | None = None,
        from_beginning: bool = False,
        timeout: float | None = None,
    ) -> Generator[JobResult, None, None]:
        """Results of submitted jobs, from the results topic, as `JobResult`, without end.

        With a `group`, several readers share the topic and continue where they stopped: a result counts as read when the next
        one is requested. With a `timeout`, iteration ends when nothing came for that many seconds.
        """
        session = self._here()
        found = session.client.results(group=group, from_beginning=from_beginning, timeout=timeout)
        return self._iterated(session, session.begin, found)

    def _items(
        self, jobs: Generator[StreamedJob, None, None], errors: Errors
    ) -> Generator[Embedded, None, None]:
        with contextlib.closing(jobs):
            for job in jobs:
                for item in job.items():
                    if item.error is not None and errors == "raise":
                        raise item.error
                    yield item


async def _nothing(client: AsyncEmbedClient) -> None:
    """To be open is all that is asked."""


def _remade(kind: type[EmbedClient], servers: str | list[str], settings: dict[str, Any]) -> EmbedClient:
    return kind(servers, **settings)
