"""Block-diagonal attention of short texts over a packed row, in tiles of the row: several texts share a tile.

Flash attention's kernels start work for each text and for the longest text possible, most of which has nothing to do
where texts are short. Here a program takes some neighboring queries with all keys that any of them sees, and a mask
keeps the texts apart. What it costs does not depend on the longest text, so a CUDA graph loses nothing.

A text's position in its tile decides the order of its sums: equal up to rounding, not bit-equal.
"""

# Triton's language is not Python's: what its kernels name, they neither annotate nor keep to one type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["block_attention", "block_attention_reference", "bounds_of", "bounds_reference", "takes_head"]

Bounds = tuple[Tensor, Tensor]
"""For each query its first key and one past its last, int32 (queries,)."""


def takes_head(dim: int) -> bool:
    """Whether heads of `dim` can run: Triton's tiles are powers of two, its products at least 16 wide."""
    return dim >= 16 and dim & (dim - 1) == 0


@triton.jit
def _bounds_kernel(cu_seqlens, begins, ends, count, slots, STEPS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros((ROWS,), tl.int32)
    high = tl.zeros((ROWS,), tl.int32) + slots
    for _ in tl.static_range(STEPS):  # the first slot that ends after the row
        middle = (low + high) // 2
        after = tl.load(cu_seqlens + tl.minimum(middle + 1, slots)) > rows
        open_ = low < high
        high = tl.where(open_ & after, middle, high)
        low = tl.where(open_ & ~after, middle + 1, low)
    found = low < slots
    slot = tl.minimum(low, slots - 1)
    # A row of no slot sees itself: its numbers stay finite, and are not read.
    begin = tl.where(found, tl.load(cu_seqlens + slot), rows)
    end = tl.where(found, tl.load(cu_seqlens + slot + 1), rows + 1)
    tl.store(begins + rows, begin, mask=rows < count)
    tl.store(ends + rows, end, mask=rows < count)


@triton.jit
def _attention_kernel(
    q,
    k,
    v,
    out,
    begins,
    ends,
    count,
    q_stride,
    kv_stride,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    dims = tl.arange(0, DIM)
    known = rows < count
    begin = tl.load(begins + rows, mask=known, other=0)
    end = tl.load(ends + rows, mask=known, other=0)
    some = known & (begin < end)
    first = tl.min(tl.where(some, begin, 2147483647), 0)
    last = tl.max(tl.where(some, end, 0), 0)
    queries = tl.load(
        q + rows.to(tl.int64)[:, None] * q_stride + head * DIM + dims[None, :], mask=known[:, None], other=0.0
    )
    largest = tl.full((ROWS,), -1e30, tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    for begin_key in range(first, last, KEYS):
        keys = begin_key + tl.arange(0, KEYS)
        there = keys < last
        offsets = keys.to(tl.int64) * kv_stride + head * DIM
        part = tl.load(k + offsets[None, :] + dims[:, None], mask=there[None, :], other=0.0)
        seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        scores = tl.where(seen, tl.dot(queries, part) * scale, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp2(scores - most[:, None])
        shrink = tl.exp2(largest - most)
        weights = weights * shrink + tl.sum(shares, 1)
        values = tl.load(v + offsets[:, None] + dims[None, :], mask=there[:, None], other=0.0)
        total = tl.dot(shares.to(values.dtype), values, total * shrink[:, None])
        largest = most
    value = total / tl.maximum(weights, 1e-30)[:, None]
    offsets = rows.to(tl.int64)[:, None] * (HEADS * DIM) + head * DIM + dims[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=known[:, None])


def bounds_of(cu_seqlens: Tensor, count: int) -> Bounds:
    """The bounds of every token of a row of `count`: those of its text. `cu_seqlens` is int32 (slots + 1,)."""
    slots = len(cu_seqlens) - 1
    begins, ends = torch.empty(2, count, dtype=torch.int32, device=cu_seqlens.device).unbind()
    steps = slots.bit_length()
    _bounds_kernel[(-(-count // 128),)](
        cu_seqlens, begins, ends, count, slots, STEPS=steps, ROWS=128, num_warps=4
    )
    return begins, ends


def bounds_reference(cu_seqlens: Tensor, count: int) -> Bounds:
    """The same, token by token."""
    found = [(row, row + 1) for row in range(count)]
    edges = cu_seqlens.tolist()
    for slot in range(len(edges) - 1):
        for row in range(edges[slot], edges[slot + 1]):
            found[row] = (edges[slot], edges[slot + 1])
    begins, ends = torch.tensor(found, dtype=torch.int32, device=cu_seqlens.device).unbind(1)
    return begins, ends


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, *, sparse: bool = False
) -> Tensor:
    """Attention of q (queries, heads, dim) over the keys in `bounds`, of k and v (tokens, heads, dim); contiguous.

    `sparse`: neighboring queries are of different texts, so they share no keys. A query without keys gives zeros.
    Each token's heads must lie side by side; q, k and v may be parts of wider rows, k and v of the same.
    """
    count, heads, dim = q.shape
    if not q.stride(1) == k.stride(1) == v.stride(1) == dim:
        raise RuntimeError("heads that are not contiguous. This is a bug.")
    if k.stride(0) != v.stride(0):
        raise RuntimeError("keys and values of different rows. This is a bug.")
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    rows = 16 if sparse or count <= 16 else 64
    _attention_kernel[(-(-count // rows), heads)](
        q,
        k,
        v,
        out,
        *bounds,
        count,
        q.stride(0),
        k.stride(0),
        scale * math.log2(math.e),
        HEADS=heads,
        DIM=dim,
        ROWS=rows,
        KEYS=64,
        num_warps=4,
        num_stages=2,
    )
    return out


def block_attention_reference(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float) -> Tensor:
    """The same in float32."""
    keys = torch.arange(len(k), device=k.device)
    begins, ends = (bound[:, None] for bound in bounds)
    hidden = (keys < begins) | (keys >= ends)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    shares = scores.masked_fill(hidden, float("-inf")).softmax(dim=2).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", shares, v.float())
