"""A run: rows are read, embedded and written, each as far ahead as the next one allows, until all of them are done.

    source thread   read → which of the batch are to be embedded (`plan.py`)
    event loop      jobs, `in_flight` rows at most; their answers are taken in the source's order
    target thread   write → flush → manifest, which says "done" only of what the target has

A kill at any point loses what was not flushed, and nothing else: the same run begins by reading the source again, and passes
what the manifest knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec

from embedq_batch.content.columns import text_bytes
from embedq_batch.content.rows import Problem, RowBatch, RowId, VectorBatch, joined, taken
from embedq_batch.errors import ModelChanged, RowsRefused, TargetAway, TooManyFailures
from embedq_batch.manifest.plan import GONE, Planned, Versions, Wanted, planned
from embedq_batch.manifest.store import Manifest, Written
from embedq_batch.running.embedding import Answered, Embedder, span_id
from embedq_batch.running.options import RunOptions
from embedq_batch.running.progress import Progress
from embedq_batch.sinks.sink import Sink
from embedq_batch.sources.source import Source
from embedq_sdk.errors import EmbedError
from embedq_shared.backoff import backoff

_T = TypeVar("_T")

LEAST_FOR_SHARE: Final = 100
"""Rows before a share of failures means anything."""
_JOB_BYTES: Final = 256 << 10
"""Of texts in one job: a job of long texts is answered sooner, and other clients' turn comes sooner."""
_WRITE_ROWS: Final = 1000
_WRITE_BYTES: Final = 8 << 20
"""Vectors that are written at once: stores take about this much in a request."""
_FLUSH_ROWS: Final = 20_000
_FLUSH_S: Final = 30.0
"""What a kill can cost: rows and seconds since the last flush."""
_CONFLICT: Final = Problem("duplicate_id", "expected one row of this id, got another one with other content")


class _Job(msgspec.Struct, frozen=True, eq=False):
    """Rows of one job, and how many vectors each had before."""

    rows: RowBatch
    hashes: list[bytes]
    before: dict[RowId, int]


class _Item(msgspec.Struct, frozen=True, eq=False):
    """What the writer takes next: an answer to wait for, or ids to delete."""

    job: _Job | None = None
    answer: asyncio.Task[Answered] | None = None
    deleted: list[RowId] = []


class Restart(Exception):
    """The model changed, and all rows are to be done under the new one."""


class Thread:
    """One thread, for a source or a target that may block and knows one thread alone."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function there. When the caller is cancelled it still ends there before the next one begins."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def close(self) -> None:
        """Wait for the last one."""
        await asyncio.to_thread(self._executor.shutdown)


class Pass:
    """One pass over the source.

    Invariants:
        - A row is in the manifest as done after the target has it, and never before.
        - At most `in_flight` rows are read and not answered; a slow target stops the reading.
        - Rows are written in the source's order.
    """

    # More than six parameters: the parts of a run, each with another owner.
    def __init__(
        self,
        source: Source,
        sink: Sink,
        manifest: Manifest,
        embedder: Embedder,
        versions: Versions,
        options: RunOptions,
        progress: Progress,
        threads: tuple[Thread, Thread],
        wanted: Wanted,
    ) -> None:
        self._source = source
        self._sink = sink
        self._manifest = manifest
        self._embedder = embedder
        self._versions = versions
        self._options = options
        self._progress = progress
        self._source_thread, self._sink_thread = threads
        self._wanted = wanted
        self._leaving = False
        self._queue: asyncio.Queue[_Item | None] = asyncio.Queue(
            max(1, options.in_flight // options.job_texts)
        )
        self._under_way: dict[RowId, bytes] = {}
        self._waiting: list[tuple[list[Written], VectorBatch, list[RowId]]] = []
        self._waiting_rows = 0
        self._waiting_bytes = 0
        self._unflushed: list[Written] = []
        self._failed: list[tuple[RowId, bytes, Problem]] = []
        self._first_failure = ""
        self._answered = 0
        self._flushed = time.monotonic()
        self.embedded = 0

    async def run(self) -> None:
        """Read all, embed and write what is wanted.

        Raises:
            ModelChanged, TooManyFailures, BadSource, BadTarget, EmbedError.
            Restart: begin again.
        """
        reading = asyncio.create_task(self._read(), name="embedq-run-read")
        try:
            await self._write(reading)
        except BaseException:
            # What was answered and written is not to be done again. A target that is away is no longer waited for.
            self._leaving = True
            with contextlib.suppress(EmbedError):
                await self._store()
                await self._flush()
            raise
        finally:
            reading.cancel()
            answers = []
            while not self._queue.empty():
                item = self._queue.get_nowait()
                if item is not None and item.answer is not None:
                    item.answer.cancel()
                    answers.append(item.answer)
            await asyncio.gather(reading, *answers, return_exceptions=True)

    # -- reading ----------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        if self._options.delete_missing:
            await self._source_thread(self._manifest.begin_seeing)
        batches = await self._source_thread(self._source.batches)
        while (batch := await self._source_thread(next, batches, None)) is not None:
            hashes, plan, before = await self._source_thread(self._plan, batch)
            self._progress.read += len(batch)
            self._progress.skipped += len(plan.done) + len(plan.failed)
            if batch.deleted:
                self._under_way.update(dict.fromkeys(batch.deleted, GONE))
                await self._queue.put(_Item(deleted=batch.deleted))
            for rows in job_rows(batch, plan.embed, self._options.job_texts):
                job = _Job(batch.only(rows), [hashes[n] for n in rows], before)
                self._under_way.update(zip(job.rows.ids, job.hashes, strict=True))
                await self._put(job)
            for n in plan.conflicts:
                bad = RowBatch(ids=[batch.ids[n]], texts=[_CONFLICT])
                await self._put(_Job(bad, [hashes[n]], {}))
        await self._queue.put(None)

    async def _put(self, job: _Job) -> None:
        answer = asyncio.create_task(self._embedder.embed(job.rows))
        try:
            await self._queue.put(_Item(job=job, answer=answer))
        except BaseException:
            answer.cancel()
            raise

    def _plan(self, batch: RowBatch) -> tuple[list[bytes], Planned, dict[RowId, int]]:
        hashes = batch.hashes()
        known = self._manifest.known(batch.ids)
        if self._options.delete_missing:
            self._manifest.saw(batch.ids)
        plan = planned(batch.ids, hashes, known, self._wanted, self._under_way)
        return hashes, plan, {id: done.count for id, done in known[0].items() if done.count > 1}

    # -- writing ----------------------------------------------------------------------------------------------------------

    async def _write(self, reading: asyncio.Task[None]) -> None:
        while (item := await self._next(reading)) is not None:
            if item.deleted:
                await self._store()
                await self._flush()
                await self._delete(item.deleted)
            if item.job is None or item.answer is None:
                continue
            try:
                answered = await item.answer
            finally:
                item.answer.cancel()
            self._take(item.job, answered)
            if self._waiting_rows >= _WRITE_ROWS or self._waiting_bytes >= _WRITE_BYTES:
                await self._store()
            if len(self._unflushed) >= _FLUSH_ROWS or time.monotonic() - self._flushed >= _FLUSH_S:
                await self._store()
                await self._flush()
        await self._store()
        await self._flush()

    async def _next(self, reading: asyncio.Task[None]) -> _Item | None:
        """The next item; what the reading raises is raised here, after all that was read before."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        getting = asyncio.create_task(self._queue.get())
        try:
            await asyncio.wait([getting, reading], return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            reading.result()
            return await getting
        finally:
            getting.cancel()

    def _take(self, job: _Job, answered: Answered) -> None:
        """Take an answer: vectors wait to be written, failures to be written down."""
        progress = self._progress
        progress.tokens += answered.tokens
        progress.cached += answered.cached
        for group in answered.groups:
            match self._versions.saw(group.vectors.model_version):
                case "restart":
                    raise Restart
                case "stop":
                    raise ModelChanged(
                        old=str(self._versions.newest),
                        new=group.vectors.model_version,
                        done=self._progress.embedded,
                    )
            written = [
                Written(job.rows.ids[n], job.hashes[n], group.vectors.model_version, count)
                for n, count in zip(group.rows, group.counts, strict=True)
            ]
            surplus: list[RowId] = [
                span_id(row.id, n) for row in written for n in range(row.count, job.before.get(row.id, 0))
            ]
            self._waiting.append((written, group.vectors, surplus))
            self._waiting_rows += len(group.vectors)
            self._waiting_bytes += group.vectors.vectors.nbytes
        for n, problem in answered.problems.items():
            self._fail(job.rows.ids[n], job.hashes[n], problem)
        self._answered += len(job.rows)
        self._check_share()

    def _fail(self, id: RowId, hash: bytes, problem: Problem) -> None:
        self._progress.failed += 1
        self._first_failure = self._first_failure or f"{id}: {problem.code}: {problem.message}"
        self._failed.append((id, hash, problem))

    def _check_share(self) -> None:
        """Raises TooManyFailures where too many of the rows that were answered failed."""
        failed, share = self._progress.failed, self._options.max_error_share
        if self._answered >= LEAST_FOR_SHARE and failed > share * self._answered:
            raise TooManyFailures(
                failed=failed, handled=self._answered, share=share, first=self._first_failure
            )

    async def _store(self) -> None:
        """Write what waits, those of one model version at once."""
        waiting, self._waiting = self._waiting, []
        self._waiting_rows = self._waiting_bytes = 0
        while waiting:
            head = waiting[0][1]
            alike = 0
            while alike < len(waiting) and _alike(waiting[alike][1], head):
                alike += 1
            some, waiting = waiting[:alike], waiting[alike:]
            rows = [row for written, _, _ in some for row in written]
            batch = joined([vectors for _, vectors, _ in some])
            surplus = [id for _, _, ids in some for id in ids]
            if waiting or self._needs_new_part(batch):
                await self._flush_part()
            await self._write_rows(rows, batch)
            if surplus:
                await self._patiently(self._sink.delete, surplus)

    def _needs_new_part(self, batch: VectorBatch) -> bool:
        """Whether the model, and with it perhaps the vectors' length, is another one than before."""
        return bool(self._unflushed) and self._unflushed[-1].version != batch.model_version

    async def _write_rows(self, rows: list[Written], batch: VectorBatch) -> None:
        """Write rows; where the target refuses them, halves, until those that it refuses are alone."""
        if self._source.latest_wins:
            rows, batch = last_of_each(rows, batch)
        try:
            start = await self._patiently(self._sink.write, batch)
        except RowsRefused as refused:
            if len(rows) == 1:
                self._fail(rows[0].id, rows[0].hash, Problem("refused", refused.reason))
                self._check_share()
                return
            half = len(rows) // 2
            at = sum(row.count for row in rows[:half])
            await self._write_rows(rows[:half], batch.part(0, at))
            await self._write_rows(rows[half:], batch.part(at, len(batch)))
            return
        self._progress.embedded += len(rows)
        self.embedded += len(rows)
        for row in rows:
            self._unflushed.append(msgspec.structs.replace(row, start=start))
            start += row.count

    async def _flush_part(self) -> None:
        """Make a part of what was written, and write it down."""
        part = await self._patiently(self._sink.flush)
        rows, self._unflushed = self._unflushed, []
        if rows:
            written = [msgspec.structs.replace(row, part=part) for row in rows]
            await self._sink_thread(self._manifest.wrote, written, self._wanted.round)
        for row in rows:
            self._arrived(row.id, row.hash)

    def _arrived(self, id: RowId, content: bytes) -> None:
        """The manifest knows of a row now, unless there is a later one of its id."""
        if self._under_way.get(id) == content:
            del self._under_way[id]

    async def _flush(self) -> None:
        await self._flush_part()
        failed, self._failed = self._failed, []
        if failed:
            await self._sink_thread(self._manifest.failed, failed, self._wanted.round)
        for id, hash, _ in failed:
            self._arrived(id, hash)
        self._flushed = time.monotonic()

    async def _delete(self, ids: Sequence[RowId], *, keep_failures: bool = False) -> None:
        """Delete rows of the target, with all their spans."""
        known, _ = await self._sink_thread(self._manifest.known, ids)
        gone: list[RowId] = []
        for id in ids:
            if id in known:
                gone += vector_ids(id, known[id].count, spans=self._options.job.late)
        if gone:
            await self._patiently(self._sink.delete, gone)
        await self._sink_thread(self._manifest.forget, list(ids), keep_failures)
        for id in ids:
            self._arrived(id, GONE)
        self._progress.deleted += sum(id in known for id in ids)

    async def delete_missing(self) -> None:
        """Delete what the source no longer has."""
        missing = self._manifest.missing()
        while (found := await self._sink_thread(next, missing, None)) is not None:
            await self._delete(found)

    async def delete_failed(self, version: str) -> None:
        """Delete the vectors that rows which failed have of other model versions than this one."""
        stale = self._manifest.failed_and_stale(version, self._wanted.round)
        while (found := await self._sink_thread(next, stale, None)) is not None:
            await self._delete(found, keep_failures=True)

    async def _patiently(self, function: Callable[..., _T], *arguments: Any) -> _T:
        if self._leaving:
            return await self._sink_thread(function, *arguments)
        return await patiently(self._sink_thread, self._progress, function, *arguments)


async def patiently(thread: Thread, progress: Progress, function: Callable[..., _T], *arguments: Any) -> _T:
    """Call the target, for as long as it is away. What was written before is written again, which changes nothing."""
    attempt = 0
    while True:
        try:
            done = await thread(function, *arguments)
        except TargetAway as away:
            progress.waiting = str(away)
            await asyncio.sleep(backoff(attempt, first_s=0.5, longest_s=10.0))
            attempt += 1
            continue
        if attempt:
            progress.waiting = None
        return done


def job_rows(batch: RowBatch, rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows cut into jobs: so many, and so many bytes, or one text."""
    some: list[int] = []
    size = 0
    for n in rows:
        text = batch.texts[n]
        length = text_bytes(text) if isinstance(text, str) else 0
        if some and (len(some) >= most or size + length > _JOB_BYTES):
            yield some
            some, size = [], 0
        some.append(n)
        size += length
    if some:
        yield some


def last_of_each(rows: list[Written], batch: VectorBatch) -> tuple[list[Written], VectorBatch]:
    """Of rows with one id the last one alone: a store cannot take both at once."""
    last = {row.id: n for n, row in enumerate(rows)}
    if len(last) == len(rows):
        return rows, batch
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.count)
    chosen = sorted(last.values())
    places = [place for n in chosen for place in range(starts[n], starts[n + 1])]
    return [rows[n] for n in chosen], VectorBatch(
        ids=[batch.ids[n] for n in places],
        vectors=batch.vectors[places],
        model_version=batch.model_version,
        tokens=batch.tokens[places],
        scales=None if batch.scales is None else batch.scales[places],
        rows=None if batch.rows is None else [batch.rows[n] for n in places],
        spans=None if batch.spans is None else batch.spans[places],
        kept=None if batch.kept is None else taken(batch.kept, places),
    )


def vector_ids(id: RowId, count: int, *, spans: bool) -> list[RowId]:
    """The ids of a row's vectors."""
    return [span_id(id, n) for n in range(count)] if spans else [id]


def _alike(one: VectorBatch, other: VectorBatch) -> bool:
    return one.model_version == other.model_version and one.vectors.shape[1] == other.vectors.shape[1]
