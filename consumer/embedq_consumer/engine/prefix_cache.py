"""Prefixes that texts share: whose keys and values lie on the device, in which rows, and what a part copies from there.

All of it is decided here, without a device: graphs.py carries it there, and kernels.move_rows copies as it says.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import Tokens

__all__ = ["LONGEST_PREFIX", "MARGIN", "Prefix", "PrefixCache", "key_ends", "moves_of"]

Ids = npt.NDArray[np.int32]

LONGEST_PREFIX = 1024
"""Tokens; what is longer is no instruction, and attention is told how many keys a text may have."""
MARGIN = 256
"""Rows of zeros behind the last key: attention reads whole tiles, and what lies there times zero must be zero."""
_ZEROS = 0
"""The pool's row that no prefix gets: it is zero, and stays so."""
_REMEMBERED = 1024
"""Prefixes that came once and were not worth computing for that."""


class Prefix(msgspec.Struct, frozen=True):
    """A prefix that is new to the pool: `ids`, and the pool's rows that its keys and values go to."""

    ids: Ids
    rows: Ids


class PrefixCache:
    """Which of the pool's rows hold which prefix, one row for each token; the least recently used one makes room.

    A prefix is kept from the second text on that comes with it: one that is never seen again would only cost.
    Invariant: no prefix of a batch makes room for another of the same batch. What a batch before this one still reads
    may be given away, since the device writes the new rows behind that batch, in the order of `place`.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows - 1
        self._free = [row for row in range(rows) if row != _ZEROS]
        self._held: OrderedDict[bytes, Ids] = OrderedDict()
        self._once: OrderedDict[bytes, None] = OrderedDict()

    def place(self, batch: Sequence[Tokens]) -> tuple[list[Ids | None], list[Prefix]]:
        """For each text its prefix's rows, None if it runs whole; and the prefixes to be computed before."""
        keys = [_key(text) for text in batch]
        counts = Counter(key for key in keys if key is not None)
        room = self._rows
        for key in counts:
            if key in self._held:
                self._held.move_to_end(key)
                room -= len(self._held[key])
        new = []
        for key, count in counts.items():
            if key in self._held:
                continue
            ids = np.frombuffer(key, dtype=np.int32)
            if count == 1 and key not in self._once:
                self._remember(key)
            elif len(ids) <= room:
                room -= len(ids)
                new.append(Prefix(ids, self._take(key, len(ids))))
        return [None if key is None else self._held.get(key) for key in keys], new

    def forget(self, prefix: Prefix) -> None:
        """A prefix was not computed after all."""
        self._free.extend(self._held.pop(prefix.ids.tobytes()).tolist())

    def _remember(self, key: bytes) -> None:
        self._once[key] = None
        if len(self._once) > _REMEMBERED:
            self._once.popitem(last=False)

    def _take(self, key: bytes, count: int) -> Ids:
        # Those of this batch are the most recently used, and they leave room: none of them is reached.
        while len(self._free) < count:
            _, rows = self._held.popitem(last=False)
            self._free.extend(rows.tolist())
        self._once.pop(key, None)
        rows = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
        self._held[key] = rows
        return rows


def key_ends(cu: Ids, prefixes: Sequence[Ids]) -> Ids:
    """Cumulated lengths of the keys, of prefix and own tokens: int32 like `cu`, which cumulates own tokens alone."""
    lengths = np.zeros(len(cu), dtype=np.int32)
    lengths[1 : len(prefixes) + 1] = [len(rows) for rows in prefixes]
    return cu + np.cumsum(lengths, dtype=np.int32)


def moves_of(cu: Ids, prefixes: Sequence[Ids], kept: Ids | None) -> Ids:
    """What is copied in each layer so that each text's keys lie side by side: int32 (moves, 2) of source and target.

    `cu`: where each text's own tokens end in the row, from 0 on; `prefixes`: the pool's rows of the first texts'
    prefixes, none for the others. `kept`: the pool's rows that the row's first tokens are to be kept in.
    A source is a token of the row, or -1 - a row of the pool; a target is a row of the keys, or -1 - a row of the pool.
    Each target occurs once, and no row of the pool is read and written.
    """
    before = key_ends(cu, prefixes) - cu
    texts = len(prefixes)
    pooled = np.concatenate([*prefixes, np.empty(0, dtype=np.int32)], dtype=np.int32)
    own, total = int(cu[-1]), int(cu[-1]) + len(pooled)
    saved = 0 if kept is None else len(kept)
    moves = np.empty((total + MARGIN + saved, 2), dtype=np.int32)
    source, target = moves[:, 0], moves[:, 1]
    source[:own] = np.arange(own, dtype=np.int32)
    target[:own] = source[:own] + np.repeat(before[1:], np.diff(cu))
    source[own:total] = -1 - pooled
    target[own:total] = np.arange(len(pooled), dtype=np.int32) + np.repeat(
        cu[:texts], [len(rows) for rows in prefixes]
    )
    source[total : total + MARGIN] = -1 - _ZEROS
    target[total : total + MARGIN] = np.arange(total, total + MARGIN, dtype=np.int32)
    if kept is not None:
        source[total + MARGIN :] = np.arange(saved, dtype=np.int32)
        target[total + MARGIN :] = -1 - kept
    return moves


def _key(text: Tokens) -> bytes | None:
    fits = 0 < text.shared <= LONGEST_PREFIX and text.shared < len(text.ids)
    return text.ids[: text.shared].tobytes() if fits else None
