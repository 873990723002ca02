"""Triton kernels for what lies between the matrix products of a BERT, each with its definition in plain PyTorch.

All take rows of tokens, compute in float32 and never mix two rows, except for the mean over a text's own rows. The biases
of products are added here, where the numbers are read anyway. Rows are short (384 to 1,024 numbers, four times that
between up and down), so a program takes one whole row, or several.
"""

# Triton's language is not Python's: what its kernels name, they neither annotate nor keep to one type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, no-untyped-call"

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from embedq_consumer.engine.kernels.fused_ops import FP8, FP8_MAX, QuantizedRows

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "embed",
    "embed_reference",
    "mean_of_slots",
    "mean_of_slots_reference",
]

Norm = tuple[Tensor, Tensor]
"""Weight and bias of a LayerNorm, (width,)."""

_tiny: Any = tl.constexpr(1e-12)
_fp8_max: Any = tl.constexpr(FP8_MAX)


@triton.jit
def _store_scaled(value, rows, known, offsets, inside, out, scales):
    largest = tl.max(tl.where(inside, tl.abs(value), 0.0), 1)
    scale = tl.maximum(largest / _fp8_max, _tiny)
    tl.store(scales + rows, scale, mask=known)
    tl.store(out + offsets, (value * (1.0 / scale)[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm(x, columns, inside, weight, bias, eps, WIDTH: tl.constexpr):
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / WIDTH
    x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return x * inverse[:, None] * w[None, :] + b[None, :]


@triton.jit
def _embed_kernel(
    ids,
    positions,
    words,
    table,
    weight,
    bias,
    out,
    scaled,
    scales,
    count,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    known = rows < count
    inside = known[:, None] & (columns < WIDTH)[None, :]
    word = tl.load(ids + rows, mask=known, other=0).to(tl.int64)
    position = tl.load(positions + rows, mask=known, other=0).to(tl.int64)
    x = tl.load(words + word[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    x += tl.load(table + position[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value = _layer_norm(x, columns, inside, weight, bias, eps, WIDTH)
    offsets = rows[:, None] * WIDTH + columns[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)
    if QUANTIZE:
        _store_scaled(value, rows, known, offsets, inside, scaled, scales)


@triton.jit
def _add_layer_norm_kernel(
    x_rows,
    y_rows,
    y_bias,
    weight,
    bias,
    out,
    scaled,
    scales,
    count,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    known = rows < count
    inside = known[:, None] & (columns < WIDTH)[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    x = tl.load(x_rows + offsets, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(y_rows + offsets, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(y_bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    value = _layer_norm(x, columns, inside, weight, bias, eps, WIDTH)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)
    if QUANTIZE:
        _store_scaled(value, rows, known, offsets, inside, scaled, scales)


@triton.jit
def _bias_gelu_kernel(
    x_rows,
    bias,
    out,
    scales,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TANH: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    known = rows < count
    inside = known[:, None] & (columns < WIDTH)[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    x = tl.load(x_rows + offsets, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    if TANH:
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
        value = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if QUANTIZE:
        _store_scaled(value, rows, known, offsets, inside, out, scales)
    else:
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mean_kernel(x_rows, cu_seqlens, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    slot = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(cu_seqlens + slot)
    end = tl.load(cu_seqlens + slot + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.load(x_rows + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out + slot.to(tl.int64) * WIDTH + columns, mean, mask=columns < WIDTH)


def _shape(count: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the shape of a program: about 2,048 numbers each, so that short rows share one."""
    part = triton.next_power_of_2(width)
    rows = max(1, 2048 // part)
    warps = max(1, min(8, rows * part // 512))
    return (-(-count // rows),), {"WIDTH": width, "BLOCK": part, "ROWS": rows, "num_warps": warps}


def _scaled(count: int, width: int, device: torch.device) -> QuantizedRows:
    return (
        torch.empty(count, width, dtype=FP8, device=device),
        torch.empty(count, 1, dtype=torch.float32, device=device),
    )


def embed(
    ids: Tensor,
    positions: Tensor,
    words: Tensor,
    table: Tensor,
    norm: Norm,
    eps: float,
    *,
    quantized: bool = False,
) -> tuple[Tensor, QuantizedRows | None]:
    """The LayerNorm of word and position embeddings, (tokens, width) in words' dtype; `quantized`: in FP8 too.

    `table` holds for each position what is added to a word there, including the token type: (positions, width).
    """
    count, width = len(ids), words.shape[1]
    out = torch.empty(count, width, dtype=words.dtype, device=ids.device)
    scaled = _scaled(count, width, ids.device) if quantized else None
    grid, shape = _shape(count, width)
    _embed_kernel[grid](
        ids,
        positions,
        words,
        table,
        *norm,
        out,
        *(scaled or (out, out)),
        count,
        eps,
        QUANTIZE=quantized,
        **shape,
    )
    return out, scaled


def embed_reference(
    ids: Tensor, positions: Tensor, words: Tensor, table: Tensor, norm: Norm, eps: float
) -> Tensor:
    """The same in float32."""
    total = words[ids.long()].float() + table[positions.long()].float()
    return F.layer_norm(total, total.shape[1:], norm[0].float(), norm[1].float(), eps)


def add_layer_norm(
    x: Tensor,
    y: Tensor,
    y_bias: Tensor,
    norm: Norm,
    eps: float,
    *,
    quantized: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, QuantizedRows | None]:
    """The LayerNorm of x + y + y_bias, x and y contiguous (rows, width), in x's dtype; `quantized`: in FP8 too.

    `out`, in any dtype, takes the result.
    """
    count, width = x.shape
    if out is None:
        out = torch.empty_like(x)
    scaled = _scaled(count, width, x.device) if quantized else None
    grid, shape = _shape(count, width)
    _add_layer_norm_kernel[grid](
        x, y, y_bias, *norm, out, *(scaled or (out, out)), count, eps, QUANTIZE=quantized, **shape
    )
    return out, scaled


def add_layer_norm_reference(x: Tensor, y: Tensor, y_bias: Tensor, norm: Norm, eps: float) -> Tensor:
    """The same in float32."""
    total = x.float() + y.float() + y_bias.float()
    return F.layer_norm(total, total.shape[1:], norm[0].float(), norm[1].float(), eps)


def bias_gelu(x: Tensor, bias: Tensor, *, tanh: bool, quantized: bool = False) -> Tensor | QuantizedRows:
    """GELU of x + bias, x contiguous (rows, width): exact, or by its approximation with tanh."""
    count, width = x.shape
    scaled = _scaled(count, width, x.device) if quantized else None
    out, scales = scaled or (torch.empty_like(x), x)
    grid, shape = _shape(count, width)
    _bias_gelu_kernel[grid](x, bias, out, scales, count, TANH=tanh, QUANTIZE=quantized, **shape)
    return scaled or out


def bias_gelu_reference(x: Tensor, bias: Tensor, *, tanh: bool) -> Tensor:
    """The same in float32."""
    return F.gelu(x.float() + bias.float(), approximate="tanh" if tanh else "none")


def mean_of_slots(x: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
    """Write each text's mean over its tokens to `out`, float32 (slots, width); zeros for a slot without a text.

    The order of a text's sum does not depend on where it lies in the row.
    """
    slots, width = out.shape
    _mean_kernel[(slots, -(-width // 64))](x, cu_seqlens, out, WIDTH=width, COLUMNS=64, ROWS=32, num_warps=4)


def mean_of_slots_reference(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same, slot by slot."""
    ends = cu_seqlens.tolist()
    parts = [x[begin:end].float() for begin, end in pairwise(ends)]
    return torch.stack([part.mean(0) if len(part) else part.sum(0) for part in parts])
