"""Which sizes rows have on a CUDA device, and which texts go into one row. Pure: no device, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from embedq_consumer.engine.prefix_cache import MARGIN

__all__ = ["RowSizes", "best_fit", "sizes_up_to", "slots_for"]

_FIXED_TOKENS: Final = 1024
"""Size of the rows in deterministic mode: every text that fits runs in a row of this one size."""
_KEYS_A_TOKEN: Final = 4
"""Room for keys in a row with shared prefixes, for each token of a part."""


def sizes_up_to(limit: int) -> tuple[int, ...]:
    """The rows' sizes in tokens: powers of two, from 1,024 on with three more between each two.

    32 is left out: it takes as long as 64, both being bound by the weights, and in FP8 a tenth longer.
    """
    sizes = [16, 64]
    while sizes[-1] < limit:
        last = sizes[-1]
        step = last if last < 1024 else (1 << (last.bit_length() - 1)) // 4
        sizes.append(last + step)
    return tuple(size for size in sizes if size <= limit)


def slots_for(size: int) -> tuple[int, ...]:
    """The numbers of sequence slots that rows of `size` tokens are made with, ascending: attention pays for each slot,
    used or not."""
    return tuple(sorted({max(16, size // tokens) for tokens in (128, 32, 8)}))


def best_fit(
    lengths: Sequence[int],
    size: int,
    most: int,
    window: int = 256,
    *,
    prefixes: Sequence[int] | None = None,
    prefix_room: int = 0,
) -> list[list[int]]:
    """Indices of `lengths` in parts of at most `size` tokens and `most` sequences; a longer sequence is a part alone.

    `prefixes`: tokens of each sequence's shared prefix, at most `prefix_room` together in a part.

    A part takes sequences in their order while there is ample room, then the longest that still fits among the next
    `window`: so all parts but the last are full, and long and short ones stay mixed, which evens out their attention.
    """
    shared = [0] * len(lengths) if prefixes is None else prefixes
    waiting = deque(range(len(lengths)))
    parts: list[list[int]] = []
    while waiting:
        part = [waiting.popleft()]
        room = size - lengths[part[0]]
        spare = prefix_room - shared[part[0]]
        while (
            waiting
            and len(part) < most
            and lengths[waiting[0]] <= room
            and shared[waiting[0]] <= spare
            and room > size // 8
        ):
            part.append(waiting.popleft())
            room -= lengths[part[-1]]
            spare -= shared[part[-1]]
        near = [waiting[n] for n in range(min(window, len(waiting)))]
        for index in sorted(near, key=lambda index: -lengths[index]):
            if len(part) < most and lengths[index] <= room and shared[index] <= spare:
                part.append(index)
                room -= lengths[index]
                spare -= shared[index]
                waiting.remove(index)
        parts.append(part)
    return parts


class RowSizes:
    """The rows that have a CUDA graph, and how a batch is cut into parts that fit one.

    Invariants:
    - A part has at most `part_tokens` tokens, or is a single text that is longer.
    - Where `limit` is not below `part_tokens`, every part of at most `limit` tokens fits a row.
    - `deterministic`: the row that a text runs in depends on its own length alone.
    """

    def __init__(self, limit: int, part_tokens: int, *, deterministic: bool = False) -> None:
        """`limit`: tokens of the largest row with a graph. Larger batches are cut into parts of `part_tokens`."""
        self._deterministic = deterministic
        self._sizes = sizes_up_to(limit)
        # One and a half of a power of two is near enough where a prefix is saved.
        self._shared_sizes = tuple(size for size in self._sizes if size & (size - 1) == 0 or not size % 3)
        self.part_tokens = _FIXED_TOKENS if deterministic else part_tokens
        self.largest = self._sizes[-1], slots_for(self._sizes[-1])[-1]
        """Size and slots of the largest row."""
        self.key_room = _KEYS_A_TOKEN * max(part_tokens, self._sizes[-1]) + MARGIN
        """Keys that a row with shared prefixes has room for."""
        self._prefix_room = self.key_room - MARGIN - max(self.part_tokens, self._sizes[-1])
        self._rows = {shared: self._all_rows(shared) for shared in (False, True)}

    def rows(self, *, shared: bool) -> list[tuple[int, int]]:
        """Size and slots of every row that has a graph, ascending; those with shared prefixes, or those without."""
        return self._rows[shared]

    def fitting(self, tokens: int, sequences: int, *, shared: bool) -> tuple[int, int] | None:
        """The smallest row that fits, as size and slots; None if none does. An unused tail takes a slot, too."""
        return next(
            (
                (size, slots)
                for size, slots in self._rows[shared]
                if size >= tokens and slots >= sequences + (size > tokens)
            ),
            None,
        )

    def parts(self, lengths: Sequence[int], prefixes: Sequence[int]) -> list[list[int]]:
        """Indices of the texts of each part: `lengths` in tokens that run, `prefixes` in tokens that are read."""
        whole = sum(lengths) <= self.part_tokens and sum(prefixes) <= self._prefix_room
        if whole and self.fitting(sum(lengths), len(lengths), shared=any(prefixes)):
            return [list(range(len(lengths)))] if lengths else []
        most = slots_for(self.part_tokens)[-1] - 1
        return best_fit(lengths, self.part_tokens, most, prefixes=prefixes, prefix_room=self._prefix_room)

    def _all_rows(self, shared: bool) -> list[tuple[int, int]]:
        if shared:
            return [(size, slots_for(size)[-1]) for size in self._shared_sizes]
        if self._deterministic:
            larger = [(size, slots_for(size)[0]) for size in self._sizes if size > _FIXED_TOKENS]
            return [(_FIXED_TOKENS, slots_for(_FIXED_TOKENS)[-1]), *larger]
        return [(size, slots) for size in self._sizes for slots in slots_for(size)]
