"""The source's side of a run: rows are read, and a job is begun for those that are to be embedded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from embedq_batch.content.columns import text_bytes
from embedq_batch.content.rows import Problem, RowBatch, RowId, are_texts, picked
from embedq_batch.manifest.plan import GONE, Planned, Wanted, planned
from embedq_batch.manifest.store import Manifest
from embedq_batch.running.embedding import Answered, Embedder
from embedq_batch.running.options import RunOptions
from embedq_batch.running.progress import Progress
from embedq_batch.running.threads import Thread
from embedq_batch.running.under_way import UnderWay
from embedq_batch.sources.source import Source

_JOB_BYTES: Final = 256 << 10
"""Of texts in one job: a job of long texts is answered sooner, and other clients' turn comes sooner."""
_MOST_BYTES: Final = 4
"""Of a character in UTF-8."""
_CONFLICT: Final = Problem("duplicate_id", "expected one row of this id, got another one with other content")


class ReadJob(msgspec.Struct, frozen=True, eq=False):
    """Rows of one job, how many vectors each had before if it had several, and the answer that is on its way."""

    rows: RowBatch
    hashes: list[bytes]
    before: dict[RowId, int]
    answer: asyncio.Task[Answered]


class Deleted(msgspec.Struct, frozen=True):
    """Rows of which the source says that they are gone."""

    ids: list[RowId]


Read = ReadJob | Deleted | Exception | None
"""What comes of reading, in the source's order: and in the end what went wrong, or None."""


class _Batch(msgspec.Struct, frozen=True, eq=False):
    rows: RowBatch
    hashes: list[bytes]


class Reader:
    """Reads a source, one batch ahead of what is put into `queue`, which has room for `in_flight` rows.

    Invariant: a batch is compared with the manifest after the rows before it are under way, so that of two rows with one id
    the second one knows of the first.
    """

    # More than six parameters: what is read, what is known of it, and who embeds it.
    def __init__(
        self,
        source: Source,
        manifest: Manifest,
        embedder: Embedder,
        options: RunOptions,
        progress: Progress,
        thread: Thread,
        wanted: Wanted,
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._embedder = embedder
        self._options = options
        self._progress = progress
        self._thread = thread
        self._wanted = wanted
        self.under_way = UnderWay()
        self.queue: asyncio.Queue[Read] = asyncio.Queue(max(1, options.in_flight // options.job_texts))

    async def run(self) -> None:
        """Read all. What goes wrong is the last thing in the queue: what was read before is still good."""
        try:
            await self._read()
        except Exception as error:  # noqa: BLE001  # raised by who takes it, after all that was read before
            await self.queue.put(error)
        else:
            await self.queue.put(None)

    def answered(self) -> Iterator[tuple[ReadJob, Answered]]:
        """Jobs that were answered and not taken, in the source's order, up to where a row is deleted. The others are lost."""
        while not self.queue.empty():
            item = self.queue.get_nowait()
            if not isinstance(item, ReadJob):
                return
            if not item.answer.done():
                item.answer.cancel()
                if self._wanted.latest_wins:
                    return  # of a row's changes a later one must not be overtaken by an earlier one
            elif not item.answer.cancelled() and item.answer.exception() is None:
                yield item, item.answer.result()

    async def close(self) -> None:
        """Nobody waits for the answers any more."""
        answers = []
        while not self.queue.empty():
            item = self.queue.get_nowait()
            if isinstance(item, ReadJob):
                item.answer.cancel()
                answers.append(item.answer)
        await asyncio.gather(*answers, return_exceptions=True)

    async def _read(self) -> None:
        if self._options.delete_missing:
            await self._thread(self._manifest.begin_seeing)
        batches = await self._thread(self._source.batches)
        coming = asyncio.ensure_future(self._thread(_next, batches))
        try:
            while (batch := await coming) is not None:
                plan, before = await self._thread(self._plan, batch)
                coming = asyncio.ensure_future(self._thread(_next, batches))
                await self._begin(batch, plan, before)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    def _plan(self, batch: _Batch) -> tuple[Planned, dict[RowId, int]]:
        ids = batch.rows.ids
        under_way = self.under_way.among(
            ids
        )  # before the manifest is asked: what arrives in between is in one of both
        known = self._manifest.known(ids)
        if self._options.delete_missing:
            self._manifest.saw(ids)
        plan = planned(ids, batch.hashes, known, self._wanted, under_way)
        return plan, {id: done.count for id, done in known[0].items() if done.count > 1}

    async def _begin(self, batch: _Batch, plan: Planned, before: dict[RowId, int]) -> None:
        """Begin the jobs of a batch, as there is room for them."""
        rows = batch.rows
        self._progress.read += len(rows)
        self._progress.skipped += len(plan.done) + len(plan.failed)
        if rows.deleted:
            self.under_way.begin(rows.deleted, [GONE] * len(rows.deleted))
            await self.queue.put(Deleted(rows.deleted))
        for chosen in job_rows(rows, plan.embed, self._options.job_texts):
            job, hashes = rows.only(chosen), picked(batch.hashes, chosen)
            self.under_way.begin(job.ids, hashes)
            await self._put(job, hashes, before)
        for n in plan.conflicts:
            await self._put(RowBatch(ids=[rows.ids[n]], texts=[_CONFLICT]), [batch.hashes[n]], {})

    async def _put(self, rows: RowBatch, hashes: list[bytes], before: dict[RowId, int]) -> None:
        answer = asyncio.create_task(self._embedder.embed(rows))
        try:
            await self.queue.put(ReadJob(rows, hashes, before, answer))
        except BaseException:
            answer.cancel()
            raise


def _next(batches: Iterator[RowBatch]) -> _Batch | None:
    batch = next(batches, None)
    return None if batch is None else _Batch(batch, batch.hashes())


def job_rows(batch: RowBatch, rows: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Rows cut into jobs: so many, and so many bytes, or one text."""
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        given = picked(batch.texts, some)
        texts = given if are_texts(given) else [text for text in given if isinstance(text, str)]
        if sum(map(len, texts)) * _MOST_BYTES <= _JOB_BYTES:
            yield some
        else:
            yield from _by_bytes(batch, some)


def _by_bytes(batch: RowBatch, rows: Sequence[int]) -> Iterator[Sequence[int]]:
    first = size = 0
    for at, n in enumerate(rows):
        text = batch.texts[n]
        length = text_bytes(text) if isinstance(text, str) else 0
        if at > first and size + length > _JOB_BYTES:
            yield rows[first:at]
            first, size = at, 0
        size += length
    if first < len(rows):
        yield rows[first:]
