"""A pass over a source: rows are read, embedded and written, each as far ahead as the next one allows, until all of them are done.

    source thread   read → which of the batch are to be embedded (`plan.py`)             `reading.py`
    event loop      jobs, `in_flight` rows at most; their answers are taken in the source's order
    target thread   write → flush → manifest, which says "done" only of what the target has   `writing.py`

Each goes on while the others wait: a batch is read ahead, answers are taken while the target writes. A kill at any point loses what
was not flushed, and nothing else: the same run begins by reading the source again, and passes what the manifest knows.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from embedq_batch.content.rows import Problem, RowId, picked
from embedq_batch.errors import ModelChanged, TooManyFailures
from embedq_batch.manifest.plan import Versions, Wanted
from embedq_batch.manifest.store import Manifest
from embedq_batch.running.embedding import Answered, Embedder, Group, span_id
from embedq_batch.running.options import RunOptions
from embedq_batch.running.progress import Progress
from embedq_batch.running.reading import Deleted, Read, Reader, ReadJob
from embedq_batch.running.threads import Thread
from embedq_batch.running.under_way import Failures
from embedq_batch.running.writing import FLUSH_S, Chunk, Embedded, Writer
from embedq_batch.sinks.sink import Sink
from embedq_batch.sources.source import Source
from embedq_sdk.errors import EmbedError

_WRITE_ROWS: Final = 1000
_WRITE_BYTES: Final = 8 << 20
"""Vectors that are written at once: stores take about this much in a request."""


class Restart(Exception):
    """The model changed, and all rows are to be done under the new one."""


class Pass:
    """One pass over the source.

    Invariants:
        - At most `in_flight` rows are read and not answered, and three times `_WRITE_BYTES` answered and not written; so a
          slow target stops the reading.
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
        self._versions = versions
        self._options = options
        self._progress = progress
        self._failures = Failures(progress, options.max_error_share)
        self._reader = Reader(source, manifest, embedder, options, progress, threads[0], wanted)
        self._writer = Writer(
            sink,
            manifest,
            progress,
            threads[1],
            self._reader.under_way,
            self._failures,
            round=wanted.round,
            spans=options.job.late,
            latest_wins=wanted.latest_wins,
        )
        self._embedded: list[Embedded] = []
        self._failed: list[tuple[RowId, bytes, Problem]] = []
        self._rows = 0
        self._bytes = 0

    @property
    def embedded(self) -> int:
        """Rows that this pass wrote."""
        return self._writer.embedded

    async def run(self) -> None:
        """Read all, embed and write what is wanted.

        Raises:
            ModelChanged, TooManyFailures, BadSource, BadTarget, EmbedError.
            Restart: begin again.
        """
        reading = asyncio.create_task(self._reader.run(), name="embedq-run-read")
        try:
            await self._take_all()
            await self._writer.end()
        except BaseException:
            with contextlib.suppress(EmbedError):
                self._take_answered()
                await self._writer.leave(self._chunk())
            raise
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await self._reader.close()
            await self._writer.close()

    async def delete_missing(self) -> None:
        """Delete what the source no longer has."""
        await self._writer.delete_missing()

    async def delete_failed(self, version: str) -> None:
        """Delete the vectors that rows which failed have of other model versions than this one."""
        await self._writer.delete_failed(version)

    async def _take_all(self) -> None:
        while (item := await self._next()) is not None:
            match item:
                case ReadJob():
                    self._take(item, await self._answer(item))
                    if self._rows >= _WRITE_ROWS or self._bytes >= _WRITE_BYTES:
                        await self._writer.put(self._chunk())
                case Deleted():
                    await self._writer.put(self._chunk())
                    await self._writer.put(Chunk(deleted=item.ids))
                case _:
                    raise item
        await self._writer.put(self._chunk())

    async def _next(self) -> Read:
        queue = self._reader.queue
        return await self._writer.meanwhile(queue.get()) if queue.empty() else queue.get_nowait()

    async def _answer(self, job: ReadJob) -> Answered:
        """The answer to a job. While none comes, what came before is written."""
        try:
            while not job.answer.done():
                try:
                    await self._writer.meanwhile(job.answer, FLUSH_S)
                except TimeoutError:
                    await self._writer.put(self._chunk())
            return job.answer.result()
        finally:
            job.answer.cancel()

    def _take_answered(self) -> None:
        """Take what was answered meanwhile, so that it is not done again."""
        try:
            for job, answered in self._reader.answered():
                self._take(job, answered)
        except (Restart, ModelChanged, TooManyFailures):
            return  # the run ends anyway

    def _take(self, job: ReadJob, answered: Answered) -> None:
        """Take an answer: vectors wait to be written, failures to be written down."""
        self._progress.tokens += answered.tokens
        self._progress.cached += answered.cached
        self._progress.device_s += answered.device_s
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
            self._embedded.append(_embedded(job, group))
            self._rows += len(group.vectors)
            self._bytes += group.vectors.vectors.nbytes
        for n, problem in answered.problems.items():
            self._failed.append((job.rows.ids[n], job.hashes[n], problem))
            self._failures.failed(job.rows.ids[n], problem)
        self._failures.answered(len(job.rows))

    def _chunk(self) -> Chunk:
        """All that waits to be written."""
        chunk = Chunk(embedded=self._embedded, failed=self._failed)
        self._embedded, self._failed, self._rows, self._bytes = [], [], 0, 0
        return chunk


def _embedded(job: ReadJob, group: Group) -> Embedded:
    """A group's rows, and which of their former vectors they have no more."""
    ids = picked(job.rows.ids, group.rows)
    surplus: list[RowId] = []
    if job.before:
        counts = group.counts or [1] * len(ids)
        surplus = [
            span_id(id, n)
            for id, count in zip(ids, counts, strict=True)
            for n in range(count, job.before.get(id, 0))
        ]
    return Embedded(
        ids=ids,
        hashes=picked(job.hashes, group.rows),
        vectors=group.vectors,
        counts=group.counts,
        surplus=surplus,
    )
