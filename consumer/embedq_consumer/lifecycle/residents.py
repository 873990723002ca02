"""Which models are in the device's memory, and which of them goes when room is needed. Pure; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from embedq_consumer.batching.token_budget import Budget, Conditions, Measured
from embedq_consumer.engine import Encoder
from embedq_shared.messages import Quantization

__all__ = ["Loaded", "Residents", "Source"]


class Source(msgspec.Struct, frozen=True):
    """What a model is loaded from, and how."""

    path: Path
    quantization: Quantization | None = None
    """None: as the settings say."""
    tried: bool = False
    """`inspect` has just had a process of its own try it."""
    stamp: str | None = None
    """Which files lay there (`stamp_of`); None: whatever lies there is loaded, though a model of this path be in memory."""

    def is_same(self, other: Source) -> bool:
        """Whether both are one model for sure."""
        ours = (self.path, self.quantization, self.stamp)
        return self.stamp is not None and ours == (other.path, other.quantization, other.stamp)


class Loaded(msgspec.Struct, frozen=True):
    """An encoder and what it was loaded from."""

    encoder: Encoder
    source: Source

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.source.path


class _Resident(msgspec.Struct):
    loaded: Loaded
    users: int
    used_at: float
    measured: Measured | None = None


class Residents:
    """The models in memory: those that aliases serve or try, and those that stay although nobody does.

    Invariants:
        - A model in use never goes, and a pinned one never once it was in use.
        - Of the others at most `keep` stay; the one that was in use longest ago goes first.
        - For nothing goes nothing: where even all that may go would not make enough room, all stay.
        - What a trial has found is known as long as the model that it was found for, or one that took it over, is there, and memory has not
          run out within it.
    """

    def __init__(self, keep: int = 0, pinned: Collection[Path] = ()) -> None:
        """`pinned` are directories, links resolved."""
        self._keep = keep
        self._pinned = frozenset(pinned)
        self._residents: list[_Resident] = []
        self.changes = 0
        """How often one came or went: what was computed of memory holds as long as it does not change."""

    def find(self, source: Source) -> Loaded | None:
        """The model of these very files, if it is in memory."""
        found = (one.loaded for one in self._residents if one.loaded.source.is_same(source))
        return next(found, None)

    def add(self, loaded: Loaded) -> None:
        """It was loaded, for one user."""
        self.changes += 1
        self._residents.append(_Resident(loaded, 1, 0.0))

    def take(self, loaded: Loaded) -> None:
        """One more uses it."""
        self._of(loaded).users += 1

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return not self._residents

    def freed_by(self, loaded: Loaded) -> int:
        """Bytes that one user gives back who leaves it and does not want it kept: none where another one has it, or it is pinned."""
        stays = self._of(loaded).users > 1 or self._stays(loaded)
        return 0 if stays else loaded.encoder.weight_bytes

    def note_measured(self, loaded: Loaded, measured: Measured) -> None:
        """Remember the token budget that was found for it, or taken over."""
        self._of(loaded).measured = measured

    def budget_of(self, loaded: Loaded) -> Budget | None:
        """The token budget that it has, if it has one."""
        measured = self._of(loaded).measured
        return None if measured is None else measured.budget

    def measured_under(self, conditions: Conditions, free: int) -> Measured | None:
        """What a trial under these conditions would find with so many bytes free, if one has found it for a model that is there."""
        known = (one.measured for one in self._residents if one.measured is not None)
        return next((each for each in known if each.is_for(conditions, free)), None)

    def doubt(self, encoder: Encoder) -> None:
        """Memory ran out in the service of this model: what was found for it, and for others like it, is to be found anew."""
        its = next((one.measured for one in self._residents if one.loaded.encoder is encoder), None)
        conditions = None if its is None else its.conditions
        for one in self._residents:
            alike = (
                conditions is not None and one.measured is not None and one.measured.conditions == conditions
            )
            if alike or one.loaded.encoder is encoder:
                one.measured = None

    def leave(self, loaded: Loaded, now: float, *, keep: bool) -> list[Loaded]:
        """One user less. What goes now: it, if it was the last one and nobody wants to `keep` it, or another one in its place."""
        of = self._of(loaded)
        of.users -= 1
        of.used_at = now
        if of.users:
            return []
        if loaded.source.stamp is None or not (keep or self._stays(loaded)):
            return self._go([of])
        idle = self._idle()
        return self._go(idle[: max(0, len(idle) - self._keep)])

    @property
    def idle_bytes(self) -> int:
        """Of the models that may go."""
        return sum(one.loaded.encoder.weight_bytes for one in self._idle())

    def make_room(self, wanted: int) -> list[Loaded]:
        """What goes so that `wanted` bytes are free that were not."""
        if wanted <= 0 or self.idle_bytes < wanted:
            return []
        going: list[_Resident] = []
        for one in self._idle():
            if wanted <= 0:
                break
            going.append(one)
            wanted -= one.loaded.encoder.weight_bytes
        return self._go(going)

    def _stays(self, loaded: Loaded) -> bool:
        """Whether it is pinned. One whose files are not known could not be found again."""
        return loaded.source.stamp is not None and loaded.path in self._pinned

    def _idle(self) -> list[_Resident]:
        """Those that may go, in the order in which they would."""
        idle = [one for one in self._residents if not one.users and not self._stays(one.loaded)]
        return sorted(idle, key=lambda one: one.used_at)

    def _go(self, going: list[_Resident]) -> list[Loaded]:
        self.changes += len(going)
        self._residents = [one for one in self._residents if not any(one is other for other in going)]
        return [one.loaded for one in going]

    def _of(self, loaded: Loaded) -> _Resident:
        for one in self._residents:
            if one.loaded.encoder is loaded.encoder:
                return one
        raise RuntimeError("a model is used that is not in memory. This is a bug.")
