"""Figures of a target: from its manifest, from a pass over its source, and from the store itself."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Final

from embedq_batch.content.rows import RowBatch, RowId
from embedq_batch.corpus.figures import STANDINGS, Figures, newest, standing
from embedq_batch.manifest.look import Look
from embedq_batch.sinks.sink import Counted, Sink
from embedq_batch.sources.source import Source

DEFAULT_MODEL: Final = "default"
"""The alias of jobs that name none."""


def figures_of(
    sink: Sink, source: Source | None, version: str | None, manifest: Path | None = None
) -> Figures:
    """How a target stands, of which nothing is open yet. With a source all of it is read, and compared with the manifest.

    `version` is what the alias has; None: what most rows have.

    Raises:
        BadSource, BadTarget, TargetAway.
    """
    path = manifest or sink.manifest
    try:
        if source is not None:
            source.open()
        if not path.exists() and isinstance(sink, Counted):
            return _unrecorded(sink, sink.name, source, version)
        with Look(path) as look:
            return _recorded(look, sink, source, version)
    finally:
        sink.close()
        if source is not None:
            source.close()


def _recorded(look: Look, sink: Sink, source: Source | None, version: str | None) -> Figures:
    versions = look.versions
    version = version or newest(versions)
    done = sum(versions.values())
    if source is None:
        rows = done + look.failed
        if not look.state.complete:
            rows = max(rows, look.state.total or 0)
        counts = Counter({"current": versions.get(version or "", 0), "failed": look.failed})
        counts["older"] = done - counts["current"]
        counts["missing"] = rows - done - look.failed
    else:
        counts = _compared(look, source, version)
    store = sink if isinstance(sink, Counted) else None
    return Figures(
        target=sink.name,
        source=None if source is None else source.name,
        model=model_of(look),
        version=version,
        rows=sum(counts.values()),
        current=counts["current"],
        older=counts["older"],
        changed=counts["changed"],
        failed=counts["failed"],
        missing=counts["missing"],
        gone=done - counts["current"] - counts["older"] - counts["changed"],
        versions=versions,
        vectors=look.vectors,
        stored=None if store is None else store.stored(),
        stored_current=None if store is None or version is None else store.stored(version),
        complete=look.state.complete,
    )


def _unrecorded(sink: Counted, name: str, source: Source | None, version: str | None) -> Figures:
    """What a store says itself, and how many rows its source has."""
    stored = sink.stored()
    current = stored if version is None else sink.stored(version)
    rows = max(stored, (source.count() or 0) if source is not None else 0)
    return Figures(
        target=name,
        source=None if source is None else source.name,
        model=DEFAULT_MODEL,
        version=version,
        rows=rows,
        current=current,
        older=stored - current,
        changed=0,
        failed=0,
        missing=rows - stored,
        gone=0,
        versions={} if version is None else {version: current},
        vectors=stored,
        stored=stored,
        stored_current=current,
        complete=True,
        recorded=False,
    )


def model_of(look: Look) -> str:
    """The alias of a manifest's vectors."""
    return str((look.about.job.get("model") if look.about else None) or DEFAULT_MODEL)


def _compared(look: Look, source: Source, version: str | None) -> Counter[str]:
    """A pass over the source. Of rows with one id the last one counts; where they are is SQLite's to remember, on the disk."""
    found = sqlite3.connect("")
    try:
        found.execute("create table rows (id primary key, standing integer) without rowid")
        for batch in source.batches():
            if batch.deleted:
                found.executemany("delete from rows where id = ?", [(id,) for id in batch.deleted])
            found.executemany("insert or replace into rows values (?, ?)", _standings(look, batch, version))
        counted = found.execute("select standing, count(*) from rows group by standing")
        return Counter({STANDINGS[number]: count for number, count in counted})
    finally:
        found.close()


def _standings(look: Look, batch: RowBatch, version: str | None) -> list[tuple[RowId, int]]:
    done, failed = look.known(batch.ids)
    return [
        (id, STANDINGS.index(standing(text, hash, done.get(id), failed.get(id), version)))
        for id, text, hash in zip(batch.ids, batch.texts, batch.hashes(), strict=True)
    ]
