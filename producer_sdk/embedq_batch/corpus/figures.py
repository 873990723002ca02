"""Coverage and staleness of a target, as figures. Pure."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

from embedq_batch.content.rows import Problem
from embedq_batch.manifest.plan import Done, Failed

Standing = Literal["current", "older", "changed", "failed", "missing"]
STANDINGS: Final[tuple[Standing, ...]] = get_args(Standing)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows of a source a target has, and under which model version.

    Each row is one of five: `current`; `older`, as the source has it and of another model version; `changed`, of a text or kept
    columns that the source no longer has; `failed`; or `missing`.
    """

    target: str
    source: str | None
    """What was read; None: the figures are those of the last pass over the source, and nothing is known to have changed since."""
    model: str
    """The alias whose vectors these are to be."""
    version: str | None
    """The version that it has; None: nothing says so."""
    rows: int
    """Of the source."""
    current: int
    older: int
    changed: int
    failed: int
    missing: int
    gone: int
    """Rows of the target that the source no longer has. They count in nothing else."""
    versions: dict[str, int]
    """Rows of the target by model version."""
    vectors: int
    """That the target should have, as its manifest says."""
    stored: int | None = None
    """That it has, as it says itself; None: it was not asked, or is a file."""
    stored_current: int | None = None
    """Of them, those of the version."""
    complete: bool
    """Whether no run is under way, or stopped before its end."""
    recorded: bool = True
    """Whether there is a manifest. Where a standing sink filled the store there is none, and rows are what the store has."""
    coverage: float = 0.0
    """The share of the source's rows that are current, from 0 to 1; of no rows, 1."""
    stale: int = 0
    """Rows that are there, and older or changed."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "coverage", self.current / self.rows if self.rows else 1.0)
        msgspec.structs.force_setattr(self, "stale", self.older + self.changed)


def standing(
    text: str | Problem, hash: bytes, done: Done | None, failed: Failed | None, version: str | None
) -> Standing:
    """How the target stands with a row, of which the manifest knows this. Without a version every one is current."""
    if done is None:
        return "failed" if isinstance(text, Problem) or (failed and failed.hash == hash) else "missing"
    if done.hash != hash:
        return "changed"
    return "current" if version in (None, done.version) else "older"


def newest(versions: dict[str, int]) -> str | None:
    """The version of most rows: what a target is of, where no service says what it should be of."""
    return max(versions, key=lambda name: versions[name], default=None)
