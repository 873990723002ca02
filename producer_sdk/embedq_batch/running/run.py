"""The story of a run: open the parts, learn which model answers, pass over the source until all rows have its vectors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from embedq_batch.content.rows import Problem, RowBatch, RowId, Shape
from embedq_batch.errors import BadTarget, ModelChanged
from embedq_batch.manifest.plan import Versions, Wanted
from embedq_batch.manifest.store import About, Manifest, State
from embedq_batch.running.embedding import Embedder, RawClient, span_id
from embedq_batch.running.metrics import written
from embedq_batch.running.options import RunOptions
from embedq_batch.running.progress import Progress, reported
from embedq_batch.running.runner import Pass, Restart
from embedq_batch.running.threads import Thread, patiently
from embedq_batch.sinks.finals import json_line
from embedq_batch.sinks.sink import Sink
from embedq_batch.sources.source import Log, Source
from embedq_sdk.errors import InvalidArgument

_T = TypeVar("_T")

_NOT_THE_JOB: Final = ("lane", "trace", "client_id", "metadata", "model_version")
"""Options of a job that may be others when a run goes on. Each row's version is written down, whether it was asked for or not."""
SAME: Final = 0.999
"""Least cosine of a vector to what the target gives back: float16 and int8 keep more, another text far less."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What came of embedding some rows anew."""

    rows: int
    missing: int
    """Of them, rows that the target does not give back, or that the source no longer has."""
    different: int
    """Of them, rows whose cosine is below `SAME`."""
    least: float
    """The lowest cosine."""

    @property
    def passed(self) -> bool:
        """Whether all are there and the same."""
        return not self.missing and not self.different


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did."""

    rows: int
    """In the target."""
    embedded: int
    skipped: int
    """Done before."""
    failed: int
    """Of all runs that go on with each other."""
    deleted: int
    tokens: int
    cached: int
    device_s: float
    """Seconds of the service's device, that of a GPU where it has one; 0 where it does not say."""
    seconds: float
    model_version: str
    manifest: Path
    check: Check | None = None


class Parts(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a run works with."""

    source: Source
    sink: Sink
    client: RawClient
    options: RunOptions
    progress: Progress
    manifest: Path | None = None


async def execute(parts: Parts, report: Callable[[str], None] = lambda line: None) -> Summary:
    """Run until all rows are done. `report` is given a line a minute.

    Raises:
        BadSource, BadTarget, OtherRun, RunBusy, ModelChanged, TooManyFailures, EmbedError.
        CancelledError: what was written by then is written down; the same run goes on there.
    """
    async with AsyncExitStack() as stack:
        threads = (Thread("embedq-source"), Thread("embedq-target"))
        for thread in threads:
            stack.push_async_callback(thread.close)
        source_thread, sink_thread = threads
        stack.push_async_callback(source_thread, parts.source.close)
        await source_thread(parts.source.open)
        parts.progress.total = await source_thread(parts.source.count)
        path = parts.manifest or parts.sink.manifest
        manifest = await sink_thread(Manifest, path)
        stack.push_async_callback(sink_thread, manifest.close)
        stack.push_async_callback(sink_thread, parts.sink.close)
        await stack.enter_async_context(reported(parts.progress, report))
        metrics = await stack.enter_async_context(
            written(parts.progress, parts.sink.name, parts.options.metrics)
        )
        summary = await _Run(parts, manifest, threads).run()
        metrics.complete = True
        return summary


class _Run:
    """One run, from its first look at the manifest to its summary."""

    def __init__(self, parts: Parts, manifest: Manifest, threads: tuple[Thread, Thread]) -> None:
        self._parts = parts
        self._source, self._sink = parts.source, parts.sink
        self._options, self._progress = parts.options, parts.progress
        self._manifest = manifest
        self._threads = threads
        self._embedder = Embedder(parts.client, self._options.job, self._waits)

    def _waits(self, reason: str | None) -> None:
        self._progress.waiting = reason

    async def run(self) -> Summary:
        options, manifest = self._options, self._manifest
        dtype = options.job.dtype or "float32"
        if dtype not in self._sink.dtypes:
            raise InvalidArgument(
                argument="dtype",
                expected=f"{' or '.join(sorted(self._sink.dtypes))} for {self._sink.name}",
                got=dtype,
            )
        known = about(self._source, self._sink, options)
        await self._in_turn(lambda: manifest.claim(known, again=options.again))
        probed = await self._embedder.probe()
        shape = Shape(
            width=probed.vectors.shape[1],
            dtype=dtype,
            spans=options.job.late,
            ids="integer" if self._source.ids is int else "string",
            kept=self._source.kept,
            model_version=probed.model_version,
        )
        await self._patiently(self._open, shape)
        state = await self._in_turn(self._begun)
        version = probed.model_version
        if state is not None:
            version = await self._passes(state, version)
        elif not await self._in_turn(self._sink.complete):
            await self._patiently(self._sink.finish, manifest)
        await self._write_errors()
        check = await self._check() if options.check else None
        return await self._in_turn(lambda: self._summary(version, check))

    def _begun(self) -> State | None:
        """The state that this run begins with, written down."""
        known = self._manifest.state
        state = begun(known, self._options, self._manifest.figures().failed)
        if state is None:
            return None
        if isinstance(self._source, Log):
            if state.round == known.round:  # goes on
                self._source.since = dict(state.since) if isinstance(state.since, list) else state.since
            else:
                given = self._source.since
                since = given if isinstance(given, int | None) else sorted(given.items())
                state = msgspec.structs.replace(state, since=since)
        state = self._manifest.state = msgspec.structs.replace(state, total=self._progress.total)
        return state

    async def _in_turn(self, function: Callable[[], _T]) -> _T:
        """Call a function of target or manifest in their thread."""
        return await self._threads[1](function)

    def _open(self, shape: Shape) -> None:
        self._sink.open(shape, self._manifest, force=self._options.force)

    async def _passes(self, state: State, version: str) -> str:
        """Pass over the source until all rows have vectors of one model version, which is returned."""
        options, manifest, progress = self._options, self._manifest, self._progress
        figures = await self._in_turn(manifest.figures)
        others = [name for name in figures.versions if name != version]
        if others and options.on_model_change == "stop":
            raise ModelChanged(old=others[0], new=version, done=figures.done)
        versions = Versions(options.on_model_change, version)
        again = False
        while True:
            wanted = Wanted(
                round=state.round,
                only_changed=state.only_changed,
                retry_errors=options.retry_errors and not again,
                version=versions.newest if others or again else None,
                latest_wins=self._source.latest_wins,
            )
            progress.begin("rows" if not again else f"rows, again under {str(versions.newest)[:15]}")
            one = Pass(
                self._source,
                self._sink,
                manifest,
                self._embedder,
                versions,
                options,
                progress,
                self._threads,
                wanted,
            )
            again = True
            try:
                await one.run()
            except Restart:
                continue
            finally:
                await self._write_errors()
            newest = str(versions.newest)
            if options.delete_missing:
                await one.delete_missing()
            await one.delete_failed(newest)
            stale = await self._threads[1](manifest.stale, newest)
            if not stale:
                break
            if not one.embedded and wanted.version == newest:
                raise BadTarget(
                    target=self._sink.name,
                    reason=f"{stale:,} rows that the source no longer has are of an older model: --delete-missing deletes them",
                )
        await self._patiently(self._sink.finish, manifest)
        await self._threads[1](self._ended, state)
        return newest

    def _ended(self, state: State) -> None:
        self._manifest.state = msgspec.structs.replace(
            state, complete=True, ended=time.time(), total=self._progress.total
        )

    async def _patiently(self, function: Callable[..., None], *arguments: Any) -> None:
        await patiently(self._threads[1], self._progress, function, *arguments)

    async def _write_errors(self) -> None:
        if self._options.errors is not None:
            await self._threads[1](_write_lines, self._options.errors, self._manifest)

    # -- in the end -------------------------------------------------------------------------------------------------------

    async def _check(self) -> Check:
        """Embed some rows anew, and compare with what the target gives back."""
        chosen = set(await self._threads[1](self._manifest.some, self._options.check))
        texts = await self._threads[0](_texts_of, self._source, chosen)
        batch = RowBatch(ids=list(texts), texts=list(texts.values()))
        fresh: dict[RowId, Any] = {}
        for start in range(0, len(batch), self._options.job_texts):
            answered = await self._embedder.embed(
                batch.only(range(start, min(start + self._options.job_texts, len(batch))))
            )
            for group in answered.groups:
                fresh.update(zip(group.vectors.ids, group.vectors.floats(), strict=True))
        names = list(chosen) if not self._options.job.late else [span_id(id, 0) for id in chosen]
        stored = await self._threads[1](self._sink.fetch, names)
        cosines = [_cosine(fresh[id], stored[id]) for id in names if id in fresh and id in stored]
        return Check(
            rows=len(names),
            missing=len(names) - len(cosines),
            different=sum(cosine < SAME for cosine in cosines),
            least=min(cosines, default=1.0),
        )

    def _summary(self, version: str, check: Check | None) -> Summary:
        figures, progress = self._manifest.figures(), self._progress
        return Summary(
            rows=figures.done,
            embedded=progress.embedded,
            skipped=progress.skipped,
            failed=figures.failed,
            deleted=progress.deleted,
            tokens=progress.tokens,
            cached=progress.cached,
            device_s=progress.device_s,
            seconds=time.monotonic() - progress.started,
            model_version=version,
            manifest=self._manifest.path,
            check=check,
        )


def about(source: Source, sink: Sink, options: RunOptions) -> About:
    """What a manifest belongs to."""
    job = {
        name: value
        for name, value in msgspec.to_builtins(options.job).items()
        if value is not None and name not in _NOT_THE_JOB
    }
    return About(source=source.name, target=sink.name, job=job | options.about)


def begun(state: State, options: RunOptions, failed: int) -> State | None:
    """The state that a run begins with; None: there is nothing to do, since an earlier one is complete."""
    if not state.complete and not options.again:
        return state  # goes on, as whatever it was begun
    fresh = msgspec.structs.replace(
        state,
        round=state.round + 1,
        complete=False,
        only_changed=False,
        started=time.time(),
        command=options.command,
    )
    if state.round == 0 or options.again:
        return fresh
    if options.only_changed or options.delete_missing:
        return msgspec.structs.replace(fresh, only_changed=True)
    if options.retry_errors and failed:
        return msgspec.structs.replace(state, complete=False, only_changed=False)
    return None


def _texts_of(source: Source, ids: Iterable[RowId]) -> dict[RowId, str | Problem]:
    wanted = set(ids)
    found: dict[RowId, str | Problem] = {}
    for batch in source.batches():
        if wanted.isdisjoint(batch.ids):
            continue
        found.update(
            {
                id: text
                for id, text in zip(batch.ids, batch.texts, strict=True)
                if id in wanted and isinstance(text, str)
            }
        )
    return found


def _cosine(one: Any, other: Any) -> float:
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.dot(one, other)) / norms if norms else float(np.array_equal(one, other))


def _write_lines(path: Path, manifest: Manifest) -> None:
    """Write the failed rows aside, and give the file its name."""
    aside = path.with_name(f".{path.name}.embedq-new")
    try:
        with open(aside, "wb") as file:
            for id, problem in manifest.failures():
                file.write(json_line({"id": id, "code": problem.code, "message": problem.message}))
        os.replace(aside, path)
    except OSError as error:
        raise BadTarget(target=str(path), reason=error.strerror or str(error)) from None
