"""Prefixes that texts share: whose keys and values lie on the device, in which rows, and what a part copies from there.

All of this is decided here, without a device; cuda_graphs.py executes it, and `fused_ops.copy_rows` copies.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine.api import Tokens

__all__ = ["LONGEST_PREFIX", "MARGIN", "Prefix", "PrefixCache", "copy_plan", "key_seqlens"]

Ids = npt.NDArray[np.int32]

LONGEST_PREFIX = 1024
"""Tokens; anything longer is not an instruction, and attention is given a bound on the keys of a text."""
MARGIN = 256
"""Rows of zeros after the last key: attention reads whole tiles, and what lies there times zero must be zero."""
_ZEROS = 0
"""The pool's row that no prefix gets: it is zero and stays zero."""
_REMEMBERED = 1024
"""Prefixes seen once, and not computed yet, that are remembered."""


class Prefix(msgspec.Struct, frozen=True):
    """A prefix that is new to the pool: its `ids`, and the pool's rows for its keys and values, one for each id."""

    ids: Ids
    rows: Ids


class PrefixCache:
    """Which of the pool's rows hold which prefix, one row for each token; the least recently used prefix is evicted.

    A prefix is cached from the second text on that comes with it: one that is never seen again would only cost.

    Invariants:
    - No prefix of a batch is evicted for another of the same batch.
    - Rows that an earlier batch still reads may be assigned anew: the device writes them after that batch, in the order of
      `assign`.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows - 1
        self._free = [row for row in range(rows) if row != _ZEROS]
        self._cached: OrderedDict[bytes, Ids] = OrderedDict()
        self._seen_once: OrderedDict[bytes, None] = OrderedDict()

    def assign(self, batch: Sequence[Tokens]) -> tuple[list[Ids | None], list[Prefix]]:
        """For each text its prefix's rows, None if it runs whole; and the new prefixes, to be computed first."""
        keys = [_key(text) for text in batch]
        counts = Counter(key for key in keys if key is not None)
        room = self._rows
        for key in counts:
            if key in self._cached:
                self._cached.move_to_end(key)
                room -= len(self._cached[key])
        new = []
        for key, count in counts.items():
            if key in self._cached:
                continue
            ids = np.frombuffer(key, dtype=np.int32)
            if count == 1 and key not in self._seen_once:
                self._remember(key)
            elif len(ids) <= room:
                room -= len(ids)
                new.append(Prefix(ids, self._allocate(key, len(ids))))
        return [None if key is None else self._cached.get(key) for key in keys], new

    def forget(self, prefix: Prefix) -> None:
        """Drop a prefix that was not computed after all."""
        self._free.extend(self._cached.pop(prefix.ids.tobytes()).tolist())

    def _remember(self, key: bytes) -> None:
        self._seen_once[key] = None
        if len(self._seen_once) > _REMEMBERED:
            self._seen_once.popitem(last=False)

    def _allocate(self, key: bytes, count: int) -> Ids:
        # Those of this batch are the most recently used and fit together, so none of them is evicted.
        while len(self._free) < count:
            _, rows = self._cached.popitem(last=False)
            self._free.extend(rows.tolist())
        self._seen_once.pop(key, None)
        rows = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
        self._cached[key] = rows
        return rows


def key_seqlens(cu_seqlens: Ids, prefixes: Sequence[Ids]) -> Ids:
    """Cumulated lengths of the keys, prefix and own tokens: int32 like `cu_seqlens`, which cumulates own tokens alone."""
    lengths = np.zeros(len(cu_seqlens), dtype=np.int32)
    lengths[1 : len(prefixes) + 1] = [len(rows) for rows in prefixes]
    return cu_seqlens + np.cumsum(lengths, dtype=np.int32)


def copy_plan(cu_seqlens: Ids, prefixes: Sequence[Ids], saved_rows: Ids | None) -> Ids:
    """What is copied in each layer so that each text's keys are contiguous: int32 (copies, 2) of source and target.

    `cu_seqlens`: where each text's own tokens end in the row, from 0 on. `prefixes`: the pool's rows of the first texts'
    prefixes, none for the others. `saved_rows`: the pool's rows that the row's first tokens are saved in.
    A source is a token of the row, or -1 - a row of the pool; a target is a row of the keys, or -1 - a row of the pool.
    Each target occurs once, and no row of the pool is both read and written.
    """
    before = key_seqlens(cu_seqlens, prefixes) - cu_seqlens
    texts = len(prefixes)
    pooled = np.concatenate([*prefixes, np.empty(0, dtype=np.int32)], dtype=np.int32)
    own, total = int(cu_seqlens[-1]), int(cu_seqlens[-1]) + len(pooled)
    saved = 0 if saved_rows is None else len(saved_rows)
    copies = np.empty((total + MARGIN + saved, 2), dtype=np.int32)
    source, target = copies[:, 0], copies[:, 1]
    source[:own] = np.arange(own, dtype=np.int32)
    target[:own] = source[:own] + np.repeat(before[1:], np.diff(cu_seqlens))
    source[own:total] = -1 - pooled
    target[own:total] = np.arange(len(pooled), dtype=np.int32) + np.repeat(
        cu_seqlens[:texts], [len(rows) for rows in prefixes]
    )
    source[total : total + MARGIN] = -1 - _ZEROS
    target[total : total + MARGIN] = np.arange(total, total + MARGIN, dtype=np.int32)
    if saved_rows is not None:
        source[total + MARGIN :] = np.arange(saved, dtype=np.int32)
        target[total + MARGIN :] = -1 - saved_rows
    return copies


def _key(text: Tokens) -> bytes | None:
    fits = 0 < text.shared <= LONGEST_PREFIX and text.shared < len(text.ids)
    return text.ids[: text.shared].tobytes() if fits else None
