"""Which texts jobs ask for most, in bounded memory. Pure: times are monotonic seconds.

Space-Saving (Metwally, Agrawal, El Abbadi 2005): with room for `most` texts, each that has had more than 1/`most` of all uses is
among them, whatever came between; a text that is new takes the place of the least used one, and its count.
"""

from __future__ import annotations

from typing import Final

import msgspec

from embedq_shared.messages import Dtype, InputType, Job, Truncate

__all__ = ["MostUsed", "Wanted", "wanted_of"]

_HALF_LIFE_S: Final = 3600.0
"""Uses of an hour ago count half: what was asked for yesterday alone is forgotten."""
_LONGEST_CHARS: Final = 1024
"""Of a text and its instruction. Queries are shorter; documents are rarely asked for twice, and take memory."""
_LEAST_USES: Final = 2
"""What was asked for once need not come again."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """A text as jobs ask for it: whatever its vector depends on, but for the model."""

    text: str
    input_type: InputType | None
    instruction: str | None
    truncate: Truncate
    dimensions: int | None
    """None: all of the model."""
    dtype: Dtype


def wanted_of(job: Job) -> list[Wanted]:
    """The texts of a job whose vectors are worth keeping ready; none of those that are cut into pieces."""
    if job.chunk is not None:
        return []
    room = _LONGEST_CHARS - len(job.instruction or "")
    return [
        Wanted(
            text=text,
            input_type=job.input_type,
            instruction=job.instruction,
            truncate=job.truncate or "error",
            dimensions=job.dimensions,
            dtype=job.dtype or "float32",
        )
        for text in ([job.input] if isinstance(job.input, str) else job.input)
        if len(text) <= room
    ]


class MostUsed:
    """Counts uses of at most `most` texts.

    Invariants:
        - At most `most` texts are kept.
        - A text's count is at least its uses (each worth half after an hour) since it was last taken in, and too high by what the
          text whose place it took had; `top` counts without that.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[Wanted, int] = {}
        self._taken_over: dict[Wanted, int] = {}
        self._by_count: dict[int, dict[Wanted, None]] = {}
        """The texts of each count, the one that has waited longest for a use first."""
        self._least = 0
        self._halved_at: float | None = None

    def __len__(self) -> int:
        return len(self._counts)

    def use(self, wanted: Wanted, now: float) -> None:
        """A job asks for this one."""
        self._age(now)
        count = self._counts.get(wanted)
        if count is not None:
            self._remove(wanted, count)
            self._put(wanted, count + 1)
            if count == self._least and count not in self._by_count:
                self._least = count + 1
        elif len(self._counts) < self._most:
            self._put(wanted, 1)
            self._least = 1
        else:
            least = self._least
            gone = next(iter(self._by_count[least]))
            self._remove(gone, least)
            del self._counts[gone]
            self._taken_over.pop(gone, None)
            self._taken_over[wanted] = least
            self._put(wanted, least + 1)
            if least not in self._by_count:
                self._least = least + 1

    def top(self) -> list[Wanted]:
        """Those that were surely asked for more than once, the most used first."""
        uses = {wanted: count - self._taken_over.get(wanted, 0) for wanted, count in self._counts.items()}
        kept = [wanted for wanted, count in uses.items() if count >= _LEAST_USES]
        return sorted(kept, key=uses.__getitem__, reverse=True)

    def _put(self, wanted: Wanted, count: int) -> None:
        self._counts[wanted] = count
        self._by_count.setdefault(count, {})[wanted] = None

    def _remove(self, wanted: Wanted, count: int) -> None:
        alike = self._by_count[count]
        del alike[wanted]
        if not alike:
            del self._by_count[count]

    def _age(self, now: float) -> None:
        if self._halved_at is None:
            self._halved_at = now
        if (halvings := int((now - self._halved_at) / _HALF_LIFE_S)) < 1:
            return
        self._halved_at += halvings * _HALF_LIFE_S
        before, self._counts, self._by_count = self._counts, {}, {}
        self._taken_over = {
            wanted: over >> halvings for wanted, over in self._taken_over.items() if over >> halvings
        }
        for wanted, count in before.items():
            if count >> halvings:
                self._put(wanted, count >> halvings)
            else:
                self._taken_over.pop(wanted, None)
        self._least = min(self._by_count, default=0)
