"""Where the texts of a store are: in the store itself, or where they came from; and how they were embedded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from embedq_batch.content.columns import Columns, recalled
from embedq_batch.errors import BadSource
from embedq_batch.manifest.look import Look
from embedq_batch.sinks.arrow import OURS
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from embedq_batch.sources.source import Named

_ROWS: Final = ".rows.jsonl"
"""What a file .npy has beside it."""
_JOB: Final = ("dimensions", "dtype", "input_type", "instruction", "truncate", "chunk")
"""What decides a vector besides its model: it stays as it was unless somebody says otherwise."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a store's texts are read from."""

    places: list[str]
    columns: Columns
    mirrors: bool
    """Whether that is the store itself: what is not there is in no copy of it."""
    job: dict[str, Any]
    """How they were embedded, as the store's manifest says."""


def origin_of(store: str, places: Sequence[str], columns: Columns, target: str) -> Origin:
    """Where the texts of `store`, a target of an earlier run or sink, are read: from `places`, or else from itself.

    Columns that are not given are those of its run, and of a store itself all that it has besides ours; a `target` that is a column of
    a table takes none along.

    Raises:
        BadSource: it has no texts.
        InvalidArgument, MissingPackage: it is none that is known.
    """
    recorded, job = _recorded(store)
    if places:
        given = columns != Columns()
        return Origin(places=list(places), columns=columns if given else recorded, mirrors=False, job=job)
    if columns.text is None and columns.template is None and set(recorded.text_names) <= set(recorded.keep):
        columns = msgspec.structs.replace(columns, text=recorded.text, template=recorded.template)
    place = f"{store.removesuffix('.npy')}{_ROWS}" if store.endswith(".npy") else store
    names = _names(place, columns)
    columns = msgspec.structs.replace(
        columns,
        id=columns.id or ("row" if "row" in names else "id"),
        keep=columns.keep
        or (() if _is_column(target) else tuple(name for name in names if name not in OURS)),
    )
    return Origin(places=[place], columns=columns, mirrors=True, job=job)


def _is_column(target: str) -> bool:
    """Whether a target is a column of a table: that has all others already."""
    return target.startswith("postgres") and ":" in target.rpartition("#")[2]


def _recorded(store: str) -> tuple[Columns, dict[str, Any]]:
    """Columns and job of the run that made a store, if there is its manifest."""
    path: Path = opened_sink(store).manifest
    if not path.exists():
        return Columns(), {}
    with Look(path) as look:
        job = look.about.job if look.about is not None else {}
    return recalled(job), {name: job[name] for name in _JOB if name in job}


def _names(place: str, columns: Columns) -> list[str]:
    """All columns of a store."""
    source = opened_source([place], msgspec.structs.replace(columns, keep=()))
    try:
        source.open()
        return source.names if isinstance(source, Named) else []
    except BadSource as bad:
        raise BadSource(
            source=bad.source, reason=f"{bad.reason}; --from says where the texts came from"
        ) from None
    finally:
        source.close()
