"""Which rows of a source are still to be embedded. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from embedq_batch.content.rows import RowId

OnModelChange = Literal["finish", "restart", "stop"]
GONE: Final = b"gone"
"""Stands for the content of a row that is to be deleted."""
Verdict = Literal["embed", "done", "failed", "repeat", "conflict"]


class Done(msgspec.Struct, frozen=True):
    """What is known of a row that has its vectors in the target."""

    hash: bytes
    version: str
    round: int
    """The run in which it was done last; each complete pass over a source is one."""
    count: int = 1
    """Number of its vectors."""


class Failed(msgspec.Struct, frozen=True):
    """What is known of a row that failed."""

    hash: bytes
    round: int


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a pass over the source."""

    round: int
    only_changed: bool
    """Rows that an earlier round did and that are the same count as done."""
    retry_errors: bool
    version: str | None = None
    """The model version that all shall have; None: whichever comes."""
    latest_wins: bool = False


def verdict(hash: bytes, done: Done | None, failed: Failed | None, wanted: Wanted) -> Verdict:
    """What is to be done with a row.

    A row that failed stays failed in its round, so that a run that is begun again does not try it without end. Two rows of
    one id and different content in one round are a conflict, unless the source says that the later one counts.
    """
    if failed is not None and failed.round == wanted.round and failed.hash == hash:
        return "embed" if wanted.retry_errors else "failed"
    if done is None:
        return "embed"
    if wanted.only_changed and done.round < wanted.round:
        same = done.hash == hash
    elif done.round == wanted.round:
        same = done.hash == hash
        if not same and not wanted.latest_wins:
            return "conflict"
    else:
        same = False
    if same and wanted.version in (None, done.version):
        return "done"
    return "embed"


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of a batch by what is to be done with them, as indices."""

    embed: Sequence[int]
    done: list[int]
    failed: list[int]
    conflicts: list[int]


def planned(
    ids: Sequence[RowId],
    hashes: Sequence[bytes],
    known: tuple[Mapping[RowId, Done], Mapping[RowId, Failed]],
    wanted: Wanted,
    under_way: Mapping[RowId, bytes],
) -> Planned:
    """Sort the rows of a batch. `under_way` are rows that were read earlier and are not yet written down, with their content, or
    with `GONE`: of them the manifest does not know yet."""
    if not known[0] and not known[1] and under_way.keys().isdisjoint(ids) and len(set(ids)) == len(ids):
        return Planned(embed=range(len(ids)), done=[], failed=[], conflicts=[])  # all are new, the usual case
    embed: list[int] = []
    found = Planned(embed=embed, done=[], failed=[], conflicts=[])
    here: dict[RowId, bytes] = {}
    for n, (id, hash) in enumerate(zip(ids, hashes, strict=True)):
        earlier = here.get(id) or under_way.get(id)
        if earlier is not None:
            if earlier == hash:
                found.done.append(n)
            elif wanted.latest_wins:
                embed.append(n)
                here[id] = hash
            else:
                found.conflicts.append(n)
            continue
        match verdict(hash, known[0].get(id), known[1].get(id), wanted):
            case "embed":
                embed.append(n)
                here[id] = hash
            case "failed":
                found.failed.append(n)
            case "conflict":
                found.conflicts.append(n)
            case _:
                found.done.append(n)
    return found


class Versions:
    """The model versions that answers came from, and what a change means for the pass. Pure.

    The newest is that of the last answer in the source's order: while replicas are reloaded one after the other, answers of
    both come mixed, and a roll-back returns to an earlier one.
    """

    def __init__(self, policy: OnModelChange, known: str | None) -> None:
        self._policy = policy
        self.first = known
        self.newest = known

    def saw(self, version: str) -> Literal["go on", "restart", "stop"]:
        """An answer came from this version."""
        if self.newest is None:
            self.first = self.newest = version
        if version == self.newest:
            return "go on"
        if self._policy == "stop":
            return "stop"
        self.newest = version
        return "restart" if self._policy == "restart" else "go on"
