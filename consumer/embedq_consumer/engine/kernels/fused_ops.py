"""Triton kernels for what lies between a transformer's matrix products, each with its definition in plain PyTorch.

All take rows of tokens and never mix two rows, so a row of garbage (a micro-batch's unused tail) stays by itself.
Sums, norms and activations are float32; what is stored is bf16, or FP8 (e4m3) with one float32 scale for each row.
A kernel reads each value once and holds its row in registers: these are bound by memory alone.
"""

# Triton's language is not Python's: what its kernels name, they neither annotate nor keep to one type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "FP8",
    "FP8_MAX",
    "QuantizedRows",
    "add_norm",
    "add_norm_reference",
    "gate",
    "gate_reference",
    "move_rows",
    "move_rows_reference",
    "norm_rotate",
    "norm_rotate_reference",
    "quantize",
    "quantize_reference",
    "turned",
]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_TINY = 1e-12
"""The smallest scale: a row of zeros has to divide by something."""

QuantizedRows = tuple[Tensor, Tensor]
"""(FP8 rows (n, k), float32 scales (n, 1)): a row is its FP8 values times its scale."""

_tiny: Any = tl.constexpr(_TINY)
_fp8_max: Any = tl.constexpr(FP8_MAX)


@triton.jit
def _load_part(pointer, columns, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + columns).to(tl.float32)
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store_part(pointer, columns, value, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _add_norm_kernel(
    x_rows,
    y_rows,
    weight,
    out_rows,
    scales,
    eps,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_rows + row * WIDTH
    out_row = out_rows + row * WIDTH
    squares = tl.zeros((PART,), tl.float32)
    parts = ()
    for i in tl.static_range(0, WIDTH, PART):
        columns = i + tl.arange(0, PART)
        x = _load_part(x_row, columns, WIDTH, i + PART <= WIDTH)
        if ADD:
            # The sum is rounded as it is stored, so that the next layer's residual and this norm see the same numbers.
            x = (x + _load_part(y_rows + row * WIDTH, columns, WIDTH, i + PART <= WIDTH)).to(
                x_rows.dtype.element_ty
            )
            if STORE:
                _store_part(x_row, columns, x, WIDTH, i + PART <= WIDTH)
            x = x.to(tl.float32)
        squares += x * x
        parts = parts + (x,)  # noqa: RUF005  Triton has no unpacking
    inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    if QUANTISE:
        largest = tl.zeros((PART,), tl.float32)
        normed = ()
        for i in tl.static_range(0, WIDTH, PART):
            columns = i + tl.arange(0, PART)
            value = parts[i // PART] * inverse * _load_part(weight, columns, WIDTH, i + PART <= WIDTH)
            largest = tl.maximum(largest, tl.abs(value))
            normed = normed + (value,)  # noqa: RUF005
        scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
        tl.store(scales + row, scale)
        inverse_scale = 1.0 / scale
        for i in tl.static_range(0, WIDTH, PART):
            columns = i + tl.arange(0, PART)
            _store_part(out_row, columns, normed[i // PART] * inverse_scale, WIDTH, i + PART <= WIDTH)
    else:
        for i in tl.static_range(0, WIDTH, PART):
            columns = i + tl.arange(0, PART)
            value = parts[i // PART] * inverse * _load_part(weight, columns, WIDTH, i + PART <= WIDTH)
            _store_part(out_row, columns, value, WIDTH, i + PART <= WIDTH)


@triton.jit
def _gate_kernel(
    rows,
    out_rows,
    scales,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate_row = rows + row * (2 * WIDTH)
    up_row = gate_row + WIDTH
    out_row = out_rows + row * WIDTH
    largest = tl.zeros((PART,), tl.float32)
    parts = ()
    for i in tl.static_range(0, WIDTH, PART):
        columns = i + tl.arange(0, PART)
        if INTERLEAVED:
            pairs = 2 * i + tl.arange(0, 2 * PART)
            both = _load_part(gate_row, pairs, 2 * WIDTH, i + PART <= WIDTH)
            g, u = tl.split(tl.reshape(both, (PART, 2)))
        else:
            g = _load_part(gate_row, columns, WIDTH, i + PART <= WIDTH)
            u = _load_part(up_row, columns, WIDTH, i + PART <= WIDTH)
        # 1/(1+e^-g) as a squared reciprocal root: one instruction where a division takes ten.
        root = tl.rsqrt(1.0 + tl.exp2(g * -1.4426950408889634))
        value = g * u * (root * root)
        if QUANTISE:
            largest = tl.maximum(largest, tl.abs(value))
            parts = parts + (value,)  # noqa: RUF005
        else:
            _store_part(out_row, columns, value, WIDTH, i + PART <= WIDTH)
    if QUANTISE:
        scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
        tl.store(scales + row, scale)
        inverse_scale = 1.0 / scale
        for i in tl.static_range(0, WIDTH, PART):
            columns = i + tl.arange(0, PART)
            _store_part(out_row, columns, parts[i // PART] * inverse_scale, WIDTH, i + PART <= WIDTH)


@triton.jit
def _quantize_kernel(rows, out_rows, scales, WIDTH: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((PART,), tl.float32)
    parts = ()
    for i in tl.static_range(0, WIDTH, PART):
        columns = i + tl.arange(0, PART)
        value = _load_part(rows + row * WIDTH, columns, WIDTH, i + PART <= WIDTH)
        largest = tl.maximum(largest, tl.abs(value))
        parts = parts + (value,)  # noqa: RUF005
    scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
    tl.store(scales + row, scale)
    inverse_scale = 1.0 / scale
    for i in tl.static_range(0, WIDTH, PART):
        columns = i + tl.arange(0, PART)
        _store_part(
            out_rows + row * WIDTH, columns, parts[i // PART] * inverse_scale, WIDTH, i + PART <= WIDTH
        )


@triton.jit
def turned(place, weight, cosine, sine, eps, HALF: tl.constexpr):
    """Rows of one head, RMS-normalized and rotated, in two halves of their channels, rounded as they would be stored."""
    half = tl.arange(0, HALF)
    x1 = tl.load(place).to(tl.float32)
    x2 = tl.load(place + HALF).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
    x1 = x1 * inverse * tl.load(weight + half).to(tl.float32)[None, :]
    x2 = x2 * inverse * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    kind = place.dtype.element_ty
    return (x1 * cosine - x2 * sine).to(kind), (x2 * cosine + x1 * sine).to(kind)


@triton.jit
def _norm_rotate_kernel(
    rows,
    stride,
    positions,
    cosines,
    sines,
    q_weight,
    k_weight,
    eps,
    Q_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * HEADS
    half = tl.arange(0, HALF)
    position = tl.load(positions + row).to(tl.int64)
    c = tl.load(cosines + position * HALF + half)[None, :]
    s = tl.load(sines + position * HALF + half)[None, :]
    offsets = tl.arange(0, GROUP)[:, None] * (2 * HALF) + half[None, :]
    for step in tl.static_range(0, HEADS, GROUP):
        first = begin + step
        weight = q_weight
        if first >= Q_HEADS:
            weight = k_weight
        place = rows + row * stride + first * (2 * HALF) + offsets
        x1, x2 = turned(place, weight, c, s, eps, HALF)
        tl.store(place, x1)
        tl.store(place + HALF, x2)


@triton.jit
def _move_rows_kernel(own, stride, pool, keys, moves, count, WIDTH: tl.constexpr, PART: tl.constexpr):
    total = tl.load(count)
    for move in range(tl.program_id(0), total, tl.num_programs(0)):
        source = tl.load(moves + 2 * move).to(tl.int64)
        target = tl.load(moves + 2 * move + 1).to(tl.int64)
        begin = own + source * stride
        if source < 0:
            begin = pool + (-1 - source) * WIDTH
        end = keys + target * WIDTH
        if target < 0:
            end = pool + (-1 - target) * WIDTH
        for i in tl.static_range(0, WIDTH, PART):
            columns = i + tl.arange(0, PART)
            if i + PART <= WIDTH:
                tl.store(end + columns, tl.load(begin + columns))
            else:
                tl.store(end + columns, tl.load(begin + columns, mask=columns < WIDTH), mask=columns < WIDTH)


def _shape(width: int) -> dict[str, int]:
    """Parts and warps for a row of `width`: 16-byte loads, and few lanes idle in the last part."""
    part = 2048 if width > 4096 else 1024 if width >= 1024 else max(32, triton.next_power_of_2(width))
    return {"WIDTH": width, "PART": part, "num_warps": max(1, min(8, part // 256))}


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantized: bool = False,
    keep: bool = True,
    out: Tensor | None = None,
) -> Tensor | QuantizedRows:
    """Add `y` to `x` in place, and return the RMS norm of the sum, `x` (rows, width) being contiguous.

    With `keep` false `x` stays as it was. `out`, in any dtype, takes the result; `quantized` makes it FP8.
    """
    rows, width = x.shape
    if out is None:
        out = torch.empty(rows, width, dtype=FP8 if quantized else x.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if quantized else weight
    _add_norm_kernel[(rows,)](
        x,
        x if y is None else y,
        weight,
        out,
        scales,
        eps,
        ADD=y is not None,
        STORE=keep,
        QUANTISE=quantized,
        **_shape(width),
    )
    return (out, scales) if quantized else out


def add_norm_reference(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the sum in x's dtype, its RMS norm in float32)."""
    total = x if y is None else (x.float() + y.float()).to(x.dtype)
    return total, F.rms_norm(total.float(), weight.shape, weight.float(), eps)


def gate(rows: Tensor, *, quantized: bool = False, interleaved: bool = False) -> Tensor | QuantizedRows:
    """silu(a)·b of rows that hold a and b side by side, or `interleaved`: (rows, 2 width) → (rows, width)."""
    count, width = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(count, width, dtype=FP8 if quantized else rows.dtype, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device) if quantized else rows
    _gate_kernel[(count,)](
        rows,
        out,
        scales,
        INTERLEAVED=interleaved,
        QUANTISE=quantized,
        **_shape(width),
    )
    return (out, scales) if quantized else out


def gate_reference(rows: Tensor) -> Tensor:
    """The same in float32."""
    a, b = rows.float().chunk(2, dim=1)
    return F.silu(a) * b


def quantize(rows: Tensor) -> QuantizedRows:
    """FP8 rows with a scale each, so that a row's largest value is FP8's largest."""
    count, width = rows.shape
    out = torch.empty(count, width, dtype=FP8, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    _quantize_kernel[(count,)](rows, out, scales, **_shape(width))
    return out, scales


def quantize_reference(rows: Tensor) -> QuantizedRows:
    """The same, for weights too: those are quantized once and need no kernel."""
    values = rows.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=_TINY)
    return (values / scales).to(FP8), scales


def norm_rotate(
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    eps: float,
) -> None:
    """RMS norm and rotary embedding of the queries and keys in `qkv` (tokens, q, k and v side by side), in place.

    `rotation`: cosine and sine, float32 (positions, head_dim / 2); `weights`: the norms' of queries and keys, (head_dim,).
    """
    q_heads, k_heads = heads
    half = rotation[0].shape[1]
    group = 1
    while group < 8 and q_heads % (2 * group) == 0 and k_heads % (2 * group) == 0:
        group *= 2
    # One program for each token, but for few tokens one for each group of its heads: the device is idle otherwise.
    programs = (q_heads + k_heads) // group if len(qkv) <= 512 else 1
    _norm_rotate_kernel[(len(qkv), programs)](
        qkv,
        qkv.stride(0),
        positions,
        *rotation,
        *weights,
        eps,
        Q_HEADS=q_heads,
        HALF=half,
        GROUP=group,
        HEADS=(q_heads + k_heads) // programs,
        num_warps=max(1, min(4, group * half // 256)),
    )


def norm_rotate_reference(
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    eps: float,
) -> Tensor:
    """The whole of `qkv` afterwards, in float32."""
    q_heads, k_heads = heads
    dim = 2 * rotation[0].shape[1]
    split = [q_heads * dim, k_heads * dim, qkv.shape[1] - (q_heads + k_heads) * dim]
    q, k, v = torch.split(qkv.float(), split, dim=1)
    cosine, sine = (table[positions.long()][:, None].repeat(1, 1, 2) for table in rotation)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x.unflatten(1, (-1, dim)), (dim,), weight.float(), eps)
        a, b = x.chunk(2, dim=-1)
        return (x * cosine + torch.cat([-b, a], dim=-1) * sine).flatten(1)

    return torch.cat([turned(q, weights[0]), turned(k, weights[1]), v], dim=1)


def move_rows(own: Tensor, pool: Tensor, keys: Tensor, moves: Tensor, count: Tensor) -> None:
    """Copy rows of `own` (tokens, width) and `pool` to rows of `keys` and `pool`, as the first `count` of `moves` say.

    `moves`: int32 (moves, 2), see prefixes.moves_of; `count`: int32 (1,), on the device too, since a CUDA graph copies as
    much as its inputs say. `own` may be columns of wider rows; `pool` and `keys` (rows, width) lie without gaps.
    """
    width = own.shape[1]
    programs = max(256, min(2048, len(own)))
    part = min(2048, triton.next_power_of_2(width))
    _move_rows_kernel[(programs,)](
        own, own.stride(0), pool, keys, moves, count, WIDTH=width, PART=part, num_warps=4
    )


def move_rows_reference(own: Tensor, pool: Tensor, keys: Tensor, moves: Tensor, count: Tensor) -> None:
    """The same, a row at a time."""
    for source, target in moves[: int(count)].tolist():
        row = own[source] if source >= 0 else pool[-1 - source]
        if target >= 0:
            keys[target] = row
        else:
            pool[-1 - target] = row
