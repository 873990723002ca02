"""Texts of rows in, vectors out, for as long as that takes: what may heal is tried again, what will not is a row's problem."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from embedq_batch.content.rows import (
    Problem,
    RowBatch,
    RowId,
    VectorBatch,
    VectorType,
    are_texts,
    picked,
    taken,
)
from embedq_sdk.embeddings import FinishedJob, ReadDatum, ReadResult
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    Expired,
    InvalidArgument,
    JobFailed,
    KafkaRefused,
    KafkaUnavailable,
    MixedModelVersions,
    Overloaded,
    ServiceOverloaded,
    TopicMissing,
    UnknownModel,
    UnknownModelVersion,
    UnreadableReply,
)
from embedq_sdk.job_options import JobOptions
from embedq_shared.backoff import backoff
from embedq_shared.vectors import NUMPY

ASKED_AGAIN_S: Final = 86_400.0
"""How long an answer is waited for before the job is sent again: longer than any backlog, so that a job waits as long as
the backlog does, and not for ever, so that an answer that was lost, with its broker's disk perhaps, stops no run."""
MOST_ATTEMPTS: Final = 3
"""Of a row whose error may heal. The service has tried it for minutes each time."""
PROBE: Final = "embedq"
"""Any text does."""
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0


class RawClient(Protocol):
    """What is used of an `EmbedClient`."""

    async def embed_raw(
        self, texts: Sequence[str], options: JobOptions, *, timeout: float, max_attempts: int
    ) -> list[FinishedJob]: ...


class Group(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Vectors of one model version: those of the rows with these indices, `counts` of each, or one."""

    rows: Sequence[int]
    counts: list[int] | None
    vectors: VectorBatch


class Answered(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What came of some rows: each is in a group, or has a problem."""

    groups: list[Group]
    problems: dict[int, Problem]
    tokens: int
    cached: int
    """Rows that the service did not compute."""
    device_s: float = 0.0
    """Seconds of the service's device that these rows took; 0 also where it does not say."""


class Embedder:
    """Embeds rows, some at a time. `waits` is told why nothing comes, and None when it comes again."""

    def __init__(
        self,
        client: RawClient,
        options: JobOptions,
        waits: Callable[[str | None], None],
        pause: Callable[[int], float] | None = None,
    ) -> None:
        self._client = client
        self._options = options
        self._waits = waits
        self._pause = pause or _pause

    async def embed(self, batch: RowBatch) -> Answered:
        """The outcome of each row whose text is one. The batch fits one job.

        Raises:
            UnknownModel, KafkaRefused, InvalidArgument and others: no row will ever be embedded.
        """
        found = _Found(batch, self._options.dtype or "float32", spans=self._options.late)
        rows: Sequence[int] = range(len(batch))
        if found.problems:
            rows = [n for n in rows if n not in found.problems]
        waiting = deque([_Waiting(rows)])
        while waiting:
            some = waiting.popleft()
            if not some.rows:
                continue
            outcome = await self._ask(picked(batch.texts, some.rows))  # type: ignore[arg-type]  # those that are texts
            if isinstance(outcome, list):
                again = found.take(some.rows, outcome)
                if again and some.attempt + 1 < MOST_ATTEMPTS:
                    await asyncio.sleep(self._pause(some.attempt))
                    waiting.append(_Waiting(list(again), some.attempt + 1))
                else:
                    found.problems.update(again)
            elif isinstance(outcome, UnknownModel | UnknownModelVersion):
                raise outcome
            elif _heals(outcome) and some.attempt + 1 < MOST_ATTEMPTS:
                await asyncio.sleep(self._pause(some.attempt))
                waiting.append(_Waiting(some.rows, some.attempt + 1))
            elif len(some.rows) > 1:
                # One of them may be at fault. Alone at once: a text that kills processes should meet few others.
                waiting.extend(_Waiting([n], some.attempt) for n in some.rows)
            else:
                found.problems[some.rows[0]] = _problem(outcome)
        return found.answered()

    async def probe(self) -> VectorBatch:
        """The vector of a text of ours: which model answers, and how long its vectors are.

        Raises:
            EmbedError: the job asks for what the service does not do.
        """
        outcome = await self._ask([PROBE])
        if isinstance(outcome, EmbedError):
            raise outcome
        found = _Found(
            RowBatch(ids=[0], texts=[PROBE]), self._options.dtype or "float32", spans=self._options.late
        )
        again = found.take([0], outcome)
        for problem in (*again.values(), *found.problems.values()):
            raise JobFailed(code=problem.code, message=problem.message, param=None, retryable=bool(again))
        return found.answered().groups[0].vectors

    async def _ask(self, texts: list[str]) -> list[ReadResult] | EmbedError:
        """The answer to a job. Where Kafka or the service have no time for it, it is asked again until they do."""
        attempt = 0
        while True:
            try:
                (finished,) = await self._client.embed_raw(
                    texts, self._options, timeout=ASKED_AGAIN_S, max_attempts=1
                )
                outcome = finished.outcome
            except (KafkaRefused, ClientClosed):
                raise
            except (KafkaUnavailable, TopicMissing, DeadlineExceeded, Overloaded) as error:
                outcome = error
            except (InvalidArgument, UnreadableReply, MixedModelVersions) as error:
                return error
            if not isinstance(
                outcome,
                KafkaUnavailable | TopicMissing | DeadlineExceeded | Overloaded | ServiceOverloaded | Expired,
            ):
                if attempt:
                    self._waits(None)
                return outcome
            self._waits(str(outcome))
            await asyncio.sleep(self._pause(attempt))
            attempt += 1


class _Waiting(msgspec.Struct, frozen=True):
    rows: Sequence[int]
    attempt: int = 0


class _Found:
    """What is known of a batch's rows so far."""

    def __init__(self, batch: RowBatch, dtype: VectorType, *, spans: bool) -> None:
        self._batch = batch
        self._dtype = dtype
        self._spans = spans
        self._groups: list[Group] = []
        self._tokens = 0
        self._cached = 0
        self._device_s = 0.0
        self.problems: dict[int, Problem] = {}
        if not are_texts(batch.texts):
            self.problems = {n: text for n, text in enumerate(batch.texts) if isinstance(text, Problem)}

    def take(self, rows: Sequence[int], parts: list[ReadResult]) -> dict[int, Problem]:
        """Take a job's result; the rows whose errors may heal, each with its error."""
        again: dict[int, Problem] = {}
        data = parts[0].data if len(parts) == 1 else [datum for part in parts for datum in part.data]
        counts: list[int] | None = None
        if any(datum.error is not None for datum in data):
            good = []
            for datum in data:
                if datum.error is None:
                    good.append(datum)
                else:
                    problem = Problem(datum.error.code, datum.error.message)
                    (again if datum.error.retryable else self.problems)[rows[datum.index]] = problem
            data = good
        chosen = rows
        if self._spans or len(data) < len(rows):
            found = Counter([datum.index for datum in data])  # in the order of the job
            chosen = [rows[n] for n in found]
            counts = list(found.values()) if self._spans else None
        usage = parts[0].usage
        self._tokens += sum([datum.tokens or 0 for datum in data]) if usage is None else usage.total_tokens
        self._cached += self._rows_from_the_cache(data)
        self._device_s += _seconds(parts[0].timings.device)
        if data:
            vectors = self._vectors(chosen, counts, data, parts[0].model_version)
            self._groups.append(Group(rows=chosen, counts=counts, vectors=vectors))
        return again

    def _rows_from_the_cache(self, data: list[ReadDatum]) -> int:
        if not self._spans:
            return sum([bool(datum.cached) for datum in data])
        return len({datum.index for datum in data if datum.cached})

    def _vectors(
        self, rows: Sequence[int], counts: list[int] | None, data: list[ReadDatum], version: str
    ) -> VectorBatch:
        ids = picked(self._batch.ids, rows)
        of_row: list[RowId] | None = None
        spans = None
        each = rows
        if counts is not None:
            of_row = [id for id, count in zip(ids, counts, strict=True) for _ in range(count)]
            each = [n for n, count in zip(rows, counts, strict=True) for _ in range(count)]
            ids = [span_id(id, n) for id, count in zip(ids, counts, strict=True) for n in range(count)]
            spans = np.array([datum.span or (0, 0) for datum in data], np.int32)
        raw = np.frombuffer(b"".join([datum.embedding for datum in data]), NUMPY[self._dtype])
        kept: pa.RecordBatch | None = None if self._batch.kept is None else taken(self._batch.kept, each)
        return VectorBatch(
            ids=ids,
            vectors=raw.reshape(len(data), -1),
            model_version=version,
            tokens=np.array([datum.tokens or 0 for datum in data], np.int32),
            scales=np.array([datum.scale for datum in data], np.float32) if self._dtype == "int8" else None,
            rows=of_row,
            spans=spans,
            kept=kept,
        )

    def answered(self) -> Answered:
        """All of it."""
        return Answered(
            groups=self._groups,
            problems=self.problems,
            tokens=self._tokens,
            cached=self._cached,
            device_s=self._device_s,
        )


def _seconds(said: float | None) -> float:
    """What a service says of its time. Nobody has checked that it is a time."""
    return said if said is not None and 0 <= said < ASKED_AGAIN_S else 0.0


def span_id(id: RowId, number: int) -> str:
    """The id of a row's span."""
    return f"{id}#{number}"


def _heals(error: EmbedError) -> bool:
    """Whether the same job may succeed later."""
    return error.retryable if isinstance(error, JobFailed) else not isinstance(error, InvalidArgument)


def _problem(error: EmbedError) -> Problem:
    if isinstance(error, JobFailed):
        return Problem(error.code, error.message)
    return Problem(type(error).__name__, str(error))


def _pause(attempt: int) -> float:
    return backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
