"""The target's side of a run: vectors are written and flushed, and then the manifest says that their rows are done."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from embedq_batch.content.rows import Problem, RowId, VectorBatch, joined, taken
from embedq_batch.errors import RowsRefused
from embedq_batch.manifest.plan import GONE
from embedq_batch.manifest.store import Manifest, Written
from embedq_batch.running.embedding import span_id
from embedq_batch.running.progress import Progress
from embedq_batch.running.threads import Thread, patiently
from embedq_batch.running.under_way import Failures, UnderWay
from embedq_batch.sinks.sink import Sink
from embedq_sdk.errors import EmbedError

_T = TypeVar("_T")

_CHUNKS: Final = 2
"""One that is written, and one that waits, while the next one comes together."""
_FLUSH_ROWS: Final = 20_000
FLUSH_S: Final = 30.0
"""What a kill can cost: rows and seconds since the last flush."""


class Embedded(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Rows with their vectors, of one model version: one each, or as many as `counts` says. `surplus` are the ids of vectors
    that these rows had before and have no more."""

    ids: list[RowId]
    hashes: list[bytes]
    vectors: VectorBatch
    counts: list[int] | None = None
    surplus: list[RowId] = []

    def part(self, start: int, end: int) -> Embedded:
        """Some of them, in a row."""
        first, last = start, end
        if self.counts is not None:
            first, last = sum(self.counts[:start]), sum(self.counts[:end])
        return Embedded(
            ids=self.ids[start:end],
            hashes=self.hashes[start:end],
            vectors=self.vectors.part(first, last),
            counts=None if self.counts is None else self.counts[start:end],
        )


class Chunk(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the target's side is given at once: rows to write and failures to write down, or rows to delete."""

    embedded: list[Embedded] = []
    failed: list[tuple[RowId, bytes, Problem]] = []
    deleted: list[RowId] = []


class Writer:
    """Writes chunks, in their order.

    Invariants:
        - A row is in the manifest as done after the target has it, and never before.
        - At most `_CHUNKS` chunks are here; who puts another one waits for the target.
    """

    # More than six parameters: the target, the manifest, and who is told of what came of it.
    def __init__(
        self,
        sink: Sink,
        manifest: Manifest,
        progress: Progress,
        thread: Thread,
        under_way: UnderWay,
        failures: Failures,
        *,
        round: int,
        spans: bool,
        latest_wins: bool,
    ) -> None:
        self._sink = sink
        self._manifest = manifest
        self._progress = progress
        self._thread = thread
        self._under_way = under_way
        self._failures = failures
        self._round = round
        self._spans = spans
        self._latest_wins = latest_wins
        self._queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_CHUNKS)
        self._leaving = asyncio.Event()
        self._unflushed: _Part | None = None
        self._failed: list[tuple[RowId, bytes, Problem]] = []
        self._flushed = time.monotonic()
        self._task = asyncio.create_task(self._run(), name="embedq-run-write")
        self.embedded = 0
        """Rows that were written."""

    # -- what is given --------------------------------------------------------------------------------------------------

    async def put(self, chunk: Chunk) -> None:
        """Write this, when the target has time.

        Raises:
            TooManyFailures, BadTarget, EmbedError: what went wrong with an earlier one.
        """
        self._check()
        if self._room.locked():
            await self.meanwhile(self._room.acquire())
        else:
            await self._room.acquire()
        self._queue.put_nowait(chunk)

    async def meanwhile(self, waited: Awaitable[_T], patience: float | None = None) -> _T:
        """Wait for something else, while nothing goes wrong here.

        Raises:
            TimeoutError: it took longer than `patience` seconds. What is a future goes on.
            TooManyFailures, BadTarget, EmbedError: as `put`.
        """
        future = asyncio.ensure_future(waited)
        try:
            await asyncio.wait([future, self._task], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            self._check()
            raise TimeoutError
        finally:
            if future is not waited:
                future.cancel()

    def _check(self) -> None:
        if self._task.done():
            self._task.result()
            raise RuntimeError("the target's side of a run ended before the run. This is a bug.")

    async def end(self) -> None:
        """Write and flush all that was put.

        Raises:
            TooManyFailures, BadTarget, EmbedError.
        """
        self._queue.put_nowait(None)
        await asyncio.wait([self._task])
        self._task.result()

    async def leave(self, chunk: Chunk) -> None:
        """What was answered is not to be done again: write it, but wait for no target that is away.

        Raises:
            TargetAway, TooManyFailures, BadTarget, EmbedError.
        """
        self._leaving.set()
        self._queue.put_nowait(chunk)
        await self.end()

    async def close(self) -> None:
        """Stop, wherever it is."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # -- what is done with it -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while (chunk := await self._next()) is not None:
                await self._take(chunk)
                self._room.release()
            await self._flush()
        except Exception:
            self._leaving.set()
            with contextlib.suppress(EmbedError):
                await self._flush()  # what was written before is good
            raise

    async def _next(self) -> Chunk | None:
        """The next chunk; what was written is flushed when none comes."""
        while True:
            try:
                async with asyncio.timeout(FLUSH_S):
                    return await self._queue.get()
            except TimeoutError:
                if self._unflushed is not None or self._failed:
                    await self._flush()

    async def _take(self, chunk: Chunk) -> None:
        self._failed += chunk.failed
        await self._store(chunk.embedded)
        if chunk.deleted:
            await self._flush()
            await self._delete(chunk.deleted)
            return
        rows = 0 if self._unflushed is None else len(self._unflushed.ids)
        if rows >= _FLUSH_ROWS or time.monotonic() - self._flushed >= FLUSH_S:
            await self._flush()

    async def _store(self, waiting: list[Embedded]) -> None:
        """Write what was embedded, that of one model version at once."""
        while waiting:
            alike = 1
            while alike < len(waiting) and _like(waiting[alike].vectors) == _like(waiting[0].vectors):
                alike += 1
            some, waiting = waiting[:alike], waiting[alike:]
            rows = _together(some)
            if self._unflushed is not None and self._unflushed.like != _like(rows.vectors):
                await self._flush_part()  # another model: a part has vectors of one length
            await self._write(last_of_each(rows) if self._latest_wins else rows)
            if rows.surplus:
                await self._patiently(self._sink.delete, rows.surplus)

    async def _write(self, rows: Embedded) -> None:
        """Write rows; where the target refuses them, halves, until those that it refuses are alone."""
        try:
            start = await self._patiently(self._sink.write, rows.vectors)
        except RowsRefused as refused:
            if len(rows.ids) == 1:
                problem = Problem("refused", refused.reason)
                self._failed.append((rows.ids[0], rows.hashes[0], problem))
                self._failures.failed(rows.ids[0], problem)
                self._failures.answered()
                return
            half = len(rows.ids) // 2
            await self._write(rows.part(0, half))
            await self._write(rows.part(half, len(rows.ids)))
            return
        self._progress.embedded += len(rows.ids)
        self.embedded += len(rows.ids)
        if self._unflushed is None:
            self._unflushed = _Part(_like(rows.vectors), start)
        self._unflushed.add(rows)

    async def _flush_part(self) -> None:
        """Make a part of what was written, and write it down."""
        number = await self._patiently(self._sink.flush)
        part, self._unflushed = self._unflushed, None
        if part is not None:
            await self._thread(self._manifest.wrote, part.written(number), self._round)
            self._under_way.arrived(part.ids, part.hashes)

    async def _flush(self) -> None:
        await self._flush_part()
        failed, self._failed = self._failed, []
        if failed:
            await self._thread(self._manifest.failed, failed, self._round)
            self._under_way.arrived([id for id, _, _ in failed], [hash for _, hash, _ in failed])
        self._flushed = time.monotonic()

    async def _delete(self, ids: Sequence[RowId], *, keep_failures: bool = False) -> None:
        """Delete rows of the target, with all their spans."""
        known, _ = await self._thread(self._manifest.known, ids)
        gone: list[RowId] = []
        for id in ids:
            if id in known:
                gone += vector_ids(id, known[id].count, spans=self._spans)
        if gone:
            await self._patiently(self._sink.delete, gone)
        await self._thread(self._manifest.forget, list(ids), keep_failures)
        self._under_way.arrived(ids, [GONE] * len(ids))
        self._progress.deleted += sum(id in known for id in ids)

    async def delete_missing(self) -> None:
        """Delete what the source no longer has."""
        missing = self._manifest.missing()
        while (found := await self._thread(next, missing, None)) is not None:
            await self._delete(found)

    async def delete_failed(self, version: str) -> None:
        """Delete the vectors that rows which failed have of other model versions than this one."""
        stale = self._manifest.failed_and_stale(version, self._round)
        while (found := await self._thread(next, stale, None)) is not None:
            await self._delete(found, keep_failures=True)

    async def _patiently(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await patiently(self._thread, self._progress, function, *arguments, leaving=self._leaving)


class _Part:
    """What was written and not flushed: rows of one model version, the first one's vectors at `start`."""

    def __init__(self, like: tuple[str, int], start: int) -> None:
        self.like = like
        self.ids: list[RowId] = []
        self.hashes: list[bytes] = []
        self._start = start
        self._counts: list[int] = []
        self._several = False

    def add(self, rows: Embedded) -> None:
        """These were written next."""
        self.ids += rows.ids
        self.hashes += rows.hashes
        self._several = self._several or rows.counts is not None
        self._counts += [1] * len(rows.ids) if rows.counts is None else rows.counts

    def written(self, number: int) -> Written:
        """All of them, as they are written down once they are part `number` of the target."""
        return Written(
            ids=self.ids,
            hashes=self.hashes,
            version=self.like[0],
            counts=self._counts if self._several else None,
            part=number,
            start=self._start,
        )


def _together(some: list[Embedded]) -> Embedded:
    if len(some) == 1:
        return some[0]
    counts = None
    if any(rows.counts is not None for rows in some):
        counts = [count for rows in some for count in rows.counts or [1] * len(rows.ids)]
    return Embedded(
        ids=[id for rows in some for id in rows.ids],
        hashes=[hash for rows in some for hash in rows.hashes],
        vectors=joined([rows.vectors for rows in some]),
        counts=counts,
        surplus=[id for rows in some for id in rows.surplus],
    )


def last_of_each(rows: Embedded) -> Embedded:
    """Of rows with one id the last one alone: a store cannot take both at once."""
    last = {id: n for n, id in enumerate(rows.ids)}
    if len(last) == len(rows.ids):
        return rows
    counts = rows.counts or [1] * len(rows.ids)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    chosen = sorted(last.values())
    places = [place for n in chosen for place in range(starts[n], starts[n + 1])]
    batch = rows.vectors
    return Embedded(
        ids=[rows.ids[n] for n in chosen],
        hashes=[rows.hashes[n] for n in chosen],
        counts=[counts[n] for n in chosen],
        vectors=VectorBatch(
            ids=[batch.ids[n] for n in places],
            vectors=batch.vectors[places],
            model_version=batch.model_version,
            tokens=batch.tokens[places],
            scales=None if batch.scales is None else batch.scales[places],
            rows=None if batch.rows is None else [batch.rows[n] for n in places],
            spans=None if batch.spans is None else batch.spans[places],
            kept=None if batch.kept is None else taken(batch.kept, places),
        ),
        surplus=rows.surplus,
    )


def vector_ids(id: RowId, count: int, *, spans: bool) -> list[RowId]:
    """The ids of a row's vectors."""
    return [span_id(id, n) for n in range(count)] if spans else [id]


def _like(batch: VectorBatch) -> tuple[str, int]:
    """What vectors have in common that can be written at once: their model version, and their length."""
    return batch.model_version, batch.vectors.shape[1]
