"""Make a name that readers use mean another target, in one step."""

from __future__ import annotations

from pathlib import Path

import msgspec

from embedq_batch.content.addresses import without_password
from embedq_batch.corpus.counting import DEFAULT_MODEL, model_of
from embedq_batch.corpus.figures import newest
from embedq_batch.errors import BadTarget
from embedq_batch.manifest.look import Look
from embedq_batch.sinks.sink import Sink, Switchable
from embedq_batch.switching import pointer


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """What a switch did."""

    alias: str
    target: str
    model_version: str | None
    rows: int | None
    """That the target's manifest knows; None: it has none."""
    before: str | None
    """What the name meant, as its store says it."""
    back: str | None
    """The target that `switch` takes to go back; None: there was none, or it is somebody else's."""


def switch(
    alias: str, given: str, sink: Sink, *, manifest: Path | None = None, force: bool = False
) -> Switched:
    """Make `alias` mean a target, which was typed as `given`: an alias in Qdrant and Milvus, a view in PostgreSQL, a symbolic link to a
    file, or, where it ends with .json, a pointer file.

    Raises:
        BadTarget: it cannot, or the target's run is not complete and `force` is not given.
    """
    path = manifest or sink.manifest
    model, version, rows = DEFAULT_MODEL, None, None
    if path.exists():
        with Look(path) as look:
            if not look.state.complete and not force:
                raise BadTarget(
                    target=sink.name, reason="its run is not complete; --force switches to it as it is"
                )
            model, version, rows = model_of(look), newest(look.versions), sum(look.versions.values())
    if alias.endswith(pointer.SUFFIX):
        file, shown = Path(alias), without_password(given)
        known = pointer.read(file)
        before = back = None if known is None else known.target
        earlier = known.before if known is not None and known.target == shown else before
        pointer.write(file, pointer.Pointer(target=shown, model=model, model_version=version, before=earlier))
    elif isinstance(sink, Switchable):
        before = sink.point(alias)
        back = _back(alias, given, before)
    else:
        raise BadTarget(
            target=sink.name,
            reason=f"has no aliases: a pointer file, such as {alias}{pointer.SUFFIX}, can name it",
        )
    return Switched(alias=alias, target=sink.name, model_version=version, rows=rows, before=before, back=back)


def _back(alias: str, given: str, before: str | None) -> str | None:
    """The former target as it would be typed: in the same store, under another name, or a file beside the link."""
    if before is None or " " in before:
        return None
    place, mark, _ = without_password(given).rpartition("#")
    return f"{place}#{before}" if mark and ":" in place else str(Path(alias).parent / before)
