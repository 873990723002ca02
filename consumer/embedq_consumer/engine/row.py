"""The row that runs at once: its tensors on the device, and how they lie in the one copy that brings them there.

A row has `size` tokens and a fixed number of sequence slots. Sizes are few, so that each has a CUDA graph; what is unused of
a row is filler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.prefix_cache import MARGIN, ZEROS

__all__ = [
    "PART_TOKENS",
    "HiddenForward",
    "PooledForward",
    "Row",
    "Shared",
    "copy_plan",
    "input_length",
    "key_seqlens",
    "pack_prefixes",
    "pack_row",
    "positions_of",
    "shared_length",
    "split_row",
]

Ids = npt.NDArray[np.int32]

PART_TOKENS: Final = 16_384
"""What runs at once of a larger batch on CUDA: 8,192 tokens were 1 % slower in FP8 on an H200, 4,096 were 3 %.
Whether a longer text fits too is found by trial (batching/token_budget.py), and refuses no model."""

HiddenForward = Callable[[Tensor, Tensor, Packing], Tensor]
"""(ids, positions, packing) → last hidden states (tokens, hidden)."""


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What a row with shared prefixes needs in addition, on the device; `copy_plan` says what is copied where."""

    pool: Tensor
    """(layers, rows, 2 · kv_heads · head_dim): keys and values of prefixes."""
    cu_seqlens: Tensor
    """int32 (slots + 1,): 0, then where each text's keys end, its prefix's and its own."""
    count: Tensor
    """int32 (1,): number of copies."""
    copies: Tensor
    """int32 (key rows, 2), source and target of each copy; there are as many key rows."""
    longest: int
    """The most keys that a text may have."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row's inputs on the device, int32. Slots without a text hold filler, and their vectors are not read."""

    ids: Tensor
    """(size,)"""
    positions: Tensor
    """(size,): each token's position in its text, as `positions_of` counts."""
    cu_seqlens: Tensor
    """(slots + 1,): 0, then where each text ends."""
    last: Tensor
    """(slots,): each text's last token."""
    shared: Shared | None = None
    """Set where a text reads its prefix's keys from the pool; the row then holds only the texts' own tokens."""


class PooledForward(msgspec.Struct, frozen=True, kw_only=True):
    """A forward that ends in pooled vectors, and can be captured as a CUDA graph."""

    run: Callable[[Row, int, Tensor], None]
    """(row, longest, out): writes one pooled vector for each slot to `out`, float32 (slots, hidden_size)."""
    hidden_size: int
    """Components of a pooled vector."""
    device: torch.device
    attention: Callable[..., Tensor]
    """The attention kernel that it calls."""
    padding: int | None = None
    """As in `models.traits.Limits`: the token that positions do not count."""
    longest: int | None = None
    """The longest text in tokens, where attention is given this bound; None where it is given the row's size."""
    prefix_pool: Callable[[int], Tensor] | None = None
    """Allocates `Shared.pool` for a number of rows; None where prefixes cannot be shared."""


def input_length(size: int, slots: int) -> int:
    """Length of a row's inputs; the cumulated lengths come last, since their number is odd."""
    return 2 * size + 2 * slots + 1


def shared_length(size: int, slots: int, copies: int) -> int:
    """Length of a row's inputs with shared prefixes and `copies` copies; each section begins at a multiple of 16."""
    return _aligned(input_length(size, slots)) + _aligned(slots + 1) + 16 + 2 * copies


def split_row(
    inputs: Tensor, size: int, slots: int, pool: Tensor | None, longest_prefix: int, keys: int
) -> Row:
    """The tensors of a row in its `inputs`; with a `pool` and room for `keys` of shared prefixes, those of `Shared` too."""
    whole = inputs[: input_length(size, slots)]
    ids, positions, last, cu_seqlens = torch.split(whole, [size, size, slots, slots + 1])
    if pool is None or not keys:
        return Row(ids=ids, positions=positions, cu_seqlens=cu_seqlens, last=last)
    ends, count, copies = _split_shared(inputs, size, slots)
    shared = Shared(
        pool=pool,
        cu_seqlens=ends,
        count=count,
        copies=copies[: 2 * keys].view(-1, 2),
        longest=min(size + longest_prefix, keys),
    )
    return Row(ids=ids, positions=positions, cu_seqlens=cu_seqlens, last=last, shared=shared)


def positions_of(ids: Ids, lengths: Ids, padding: int | None) -> Ids:
    """The position of each token of `ids`, texts of `lengths` side by side: from 0 on in each text.

    With `padding`, that token has 0 wherever it stands, and each text's others are counted from 1 on.
    """
    begins = np.cumsum(lengths, dtype=np.int32) - lengths
    if padding is None or not (skipped := ids == padding).any():
        first = 0 if padding is None else 1
        return np.arange(first, len(ids) + first, dtype=np.int32) - np.repeat(begins, lengths)
    counted = np.cumsum(~skipped, dtype=np.int32)
    before = np.concatenate([np.zeros(1, dtype=np.int32), counted])[begins]
    counted -= np.repeat(before, lengths)
    counted[skipped] = 0
    return counted


def pack_row(
    inputs: Ids, sequences: Sequence[Ids], lengths: Ids, size: int, slots: int, padding: int | None = None
) -> None:
    """Lay one row out in `inputs`. The unused tail is token 0 in short sequences, one for each slot that is left.

    The tail has to belong to sequences, because attention must write every row: a row that is never written may hold NaN,
    which spreads to the sequence before it.
    """
    count, tokens = len(sequences), int(lengths.sum())
    ids, positions, last, cu_seqlens = np.split(inputs, [size, 2 * size, 2 * size + slots])
    ends = np.cumsum(lengths, dtype=np.int32)
    np.concatenate(sequences, out=ids[:tokens])
    ids[tokens:] = 0
    positions[:tokens] = positions_of(ids[:tokens], lengths, padding)
    positions[tokens:] = 0
    last[:count] = ends - 1
    last[count:] = 0
    cu_seqlens[0] = 0
    cu_seqlens[1 : count + 1] = ends
    if count < slots:
        filler = max(64, -(-(size - tokens) // (slots - count)))
        np.minimum(
            tokens + filler * np.arange(1, slots - count + 1),
            size,
            out=cu_seqlens[count + 1 :],
            casting="unsafe",
        )


def pack_prefixes(
    inputs: Ids, prefixes: Sequence[Ids], lengths: Ids, saved_rows: Ids | None, size: int, slots: int
) -> int:
    """Add what shared prefixes need to a row that `pack_row` has laid out; returns the length in use.

    `prefixes`: each text's rows of the pool, maybe none; its positions continue after them. `saved_rows`: rows of the pool
    that the keys and values of the row's first tokens are saved in.
    """
    prefix_lengths = np.array([len(rows) for rows in prefixes], dtype=np.int32)
    inputs[size : size + int(lengths.sum())] += np.repeat(prefix_lengths, lengths)
    length = input_length(size, slots)
    cu_seqlens = inputs[length - slots - 1 : length]
    ends, count, space = _split_shared(inputs, size, slots)
    copies = copy_plan(cu_seqlens, prefixes, saved_rows)
    ends[:] = key_seqlens(cu_seqlens, prefixes)
    count[0] = len(copies)
    space[: copies.size] = copies.reshape(-1)
    return len(inputs) - len(space) + copies.size


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
    source[total : total + MARGIN] = -1 - ZEROS
    target[total : total + MARGIN] = np.arange(total, total + MARGIN, dtype=np.int32)
    if saved_rows is not None:
        source[total + MARGIN :] = np.arange(saved, dtype=np.int32)
        target[total + MARGIN :] = -1 - saved_rows
    return copies


def _aligned(length: int) -> int:
    return -(-length // 16) * 16


def _split_shared(inputs: Any, size: int, slots: int) -> tuple[Any, Any, Any]:
    """(where each text's keys end, the number of copies, the copies) out of a tensor or an array."""
    begin = _aligned(input_length(size, slots))
    middle = begin + _aligned(slots + 1)
    return inputs[begin : begin + slots + 1], inputs[middle : middle + 1], inputs[middle + 16 :]
