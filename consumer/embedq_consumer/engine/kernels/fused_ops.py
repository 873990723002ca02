"""Triton kernels for what lies between a transformer's matrix products, each with its definition in plain PyTorch.

All take rows of tokens and never mix two rows, so garbage in one row (the unused tail of a micro-batch) spreads to none.
Sums, norms and activations are float32; what is stored is bf16, or FP8 (e4m3) with one float32 scale for each row.
A kernel reads each value once and holds its row in registers: all are bound by memory bandwidth.
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
    "copy_rows",
    "copy_rows_reference",
    "fused_add_rms_norm",
    "fused_add_rms_norm_reference",
    "norm_rope_halves",
    "per_token_quant_fp8",
    "per_token_quant_fp8_reference",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "silu_and_mul",
    "silu_and_mul_reference",
]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_TINY = 1e-12
"""The smallest scale, so that a row of zeros does not divide by zero."""
_FEW_TOKENS = 512
"""Up to so many, a program for each of them would leave the device idle."""
_COPY_PROGRAMS = 256
"""At least: enough for every multiprocessor, however few rows the plan of a captured graph then has."""

QuantizedRows = tuple[Tensor, Tensor]
"""(FP8 rows (n, k), float32 scales (n, 1)): a row is its FP8 values times its scale."""

_tiny: Any = tl.constexpr(_TINY)
_fp8_max: Any = tl.constexpr(FP8_MAX)


@triton.jit
def _load_block(pointer, columns, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + columns).to(tl.float32)
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store_block(pointer, columns, value, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _fused_add_rms_norm_kernel(
    x_rows,
    y_rows,
    weight,
    out_rows,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_rows + row * WIDTH
    out_row = out_rows + row * WIDTH
    squares = tl.zeros((BLOCK,), tl.float32)
    blocks = ()
    for i in tl.static_range(0, WIDTH, BLOCK):
        columns = i + tl.arange(0, BLOCK)
        x = _load_block(x_row, columns, WIDTH, i + BLOCK <= WIDTH)
        if ADD:
            # The sum is rounded as it is stored, so that the next layer's residual and this norm see the same numbers.
            x = (x + _load_block(y_rows + row * WIDTH, columns, WIDTH, i + BLOCK <= WIDTH)).to(
                x_rows.dtype.element_ty
            )
            if STORE:
                _store_block(x_row, columns, x, WIDTH, i + BLOCK <= WIDTH)
            x = x.to(tl.float32)
        squares += x * x
        blocks = blocks + (x,)  # noqa: RUF005  Triton has no unpacking
    inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    if QUANTIZE:
        largest = tl.zeros((BLOCK,), tl.float32)
        normed = ()
        for i in tl.static_range(0, WIDTH, BLOCK):
            columns = i + tl.arange(0, BLOCK)
            value = blocks[i // BLOCK] * inverse * _load_block(weight, columns, WIDTH, i + BLOCK <= WIDTH)
            largest = tl.maximum(largest, tl.abs(value))
            normed = normed + (value,)  # noqa: RUF005
        scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
        tl.store(scales + row, scale)
        inverse_scale = 1.0 / scale
        for i in tl.static_range(0, WIDTH, BLOCK):
            columns = i + tl.arange(0, BLOCK)
            _store_block(out_row, columns, normed[i // BLOCK] * inverse_scale, WIDTH, i + BLOCK <= WIDTH)
    else:
        for i in tl.static_range(0, WIDTH, BLOCK):
            columns = i + tl.arange(0, BLOCK)
            value = blocks[i // BLOCK] * inverse * _load_block(weight, columns, WIDTH, i + BLOCK <= WIDTH)
            _store_block(out_row, columns, value, WIDTH, i + BLOCK <= WIDTH)


@triton.jit
def _silu_and_mul_kernel(
    rows,
    out_rows,
    scales,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate_row = rows + row * (2 * WIDTH)
    up_row = gate_row + WIDTH
    out_row = out_rows + row * WIDTH
    largest = tl.zeros((BLOCK,), tl.float32)
    blocks = ()
    for i in tl.static_range(0, WIDTH, BLOCK):
        columns = i + tl.arange(0, BLOCK)
        if INTERLEAVED:
            pairs = 2 * i + tl.arange(0, 2 * BLOCK)
            both = _load_block(gate_row, pairs, 2 * WIDTH, i + BLOCK <= WIDTH)
            g, u = tl.split(tl.reshape(both, (BLOCK, 2)))
        else:
            g = _load_block(gate_row, columns, WIDTH, i + BLOCK <= WIDTH)
            u = _load_block(up_row, columns, WIDTH, i + BLOCK <= WIDTH)
        # 1/(1+e^-g) as a squared reciprocal root: one instruction where a division takes ten.
        root = tl.rsqrt(1.0 + tl.exp2(g * -1.4426950408889634))
        value = g * u * (root * root)
        if QUANTIZE:
            largest = tl.maximum(largest, tl.abs(value))
            blocks = blocks + (value,)  # noqa: RUF005
        else:
            _store_block(out_row, columns, value, WIDTH, i + BLOCK <= WIDTH)
    if QUANTIZE:
        scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
        tl.store(scales + row, scale)
        inverse_scale = 1.0 / scale
        for i in tl.static_range(0, WIDTH, BLOCK):
            columns = i + tl.arange(0, BLOCK)
            _store_block(out_row, columns, blocks[i // BLOCK] * inverse_scale, WIDTH, i + BLOCK <= WIDTH)


@triton.jit
def _per_token_quant_fp8_kernel(rows, out_rows, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    blocks = ()
    for i in tl.static_range(0, WIDTH, BLOCK):
        columns = i + tl.arange(0, BLOCK)
        value = _load_block(rows + row * WIDTH, columns, WIDTH, i + BLOCK <= WIDTH)
        largest = tl.maximum(largest, tl.abs(value))
        blocks = blocks + (value,)  # noqa: RUF005
    scale = tl.maximum(tl.max(largest, 0) / _fp8_max, _tiny)
    tl.store(scales + row, scale)
    inverse_scale = 1.0 / scale
    for i in tl.static_range(0, WIDTH, BLOCK):
        columns = i + tl.arange(0, BLOCK)
        _store_block(
            out_rows + row * WIDTH, columns, blocks[i // BLOCK] * inverse_scale, WIDTH, i + BLOCK <= WIDTH
        )


@triton.jit
def norm_rope_halves(head, weight, cosine, sine, eps, HALF: tl.constexpr):
    """Rows of one head, RMS-normalized and rotated, in two halves of their channels, rounded as they would be stored."""
    half = tl.arange(0, HALF)
    x1 = tl.load(head).to(tl.float32)
    x2 = tl.load(head + HALF).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
    x1 = x1 * inverse * tl.load(weight + half).to(tl.float32)[None, :]
    x2 = x2 * inverse * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    kind = head.dtype.element_ty
    return (x1 * cosine - x2 * sine).to(kind), (x2 * cosine + x1 * sine).to(kind)


@triton.jit
def _qk_norm_rope_kernel(
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
        head = rows + row * stride + first * (2 * HALF) + offsets
        x1, x2 = norm_rope_halves(head, weight, c, s, eps, HALF)
        tl.store(head, x1)
        tl.store(head + HALF, x2)


@triton.jit
def _copy_rows_kernel(own, stride, pool, keys, copies, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.load(count)
    for copy in range(tl.program_id(0), total, tl.num_programs(0)):
        source = tl.load(copies + 2 * copy).to(tl.int64)
        target = tl.load(copies + 2 * copy + 1).to(tl.int64)
        begin = own + source * stride
        if source < 0:
            begin = pool + (-1 - source) * WIDTH
        end = keys + target * WIDTH
        if target < 0:
            end = pool + (-1 - target) * WIDTH
        for i in tl.static_range(0, WIDTH, BLOCK):
            columns = i + tl.arange(0, BLOCK)
            if i + BLOCK <= WIDTH:
                tl.store(end + columns, tl.load(begin + columns))
            else:
                tl.store(end + columns, tl.load(begin + columns, mask=columns < WIDTH), mask=columns < WIDTH)


def _shape(width: int) -> dict[str, int]:
    """Block and warps for a row of `width`: 16-byte loads, and few idle lanes in the last block."""
    block = 2048 if width > 4096 else 1024 if width >= 1024 else max(32, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def fused_add_rms_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantized: bool = False,
    store_sum: bool = True,
    out: Tensor | None = None,
) -> Tensor | QuantizedRows:
    """Add `y` to `x` in place, and return the RMS norm of the sum; `x` is contiguous (rows, width).

    With `store_sum` false `x` stays unchanged. `out`, in any dtype, takes the result; `quantized` makes it FP8.
    """
    rows, width = x.shape
    if out is None:
        out = torch.empty(rows, width, dtype=FP8 if quantized else x.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if quantized else weight
    _fused_add_rms_norm_kernel[(rows,)](
        x,
        x if y is None else y,
        weight,
        out,
        scales,
        eps,
        ADD=y is not None,
        STORE=store_sum,
        QUANTIZE=quantized,
        **_shape(width),
    )
    return (out, scales) if quantized else out


def fused_add_rms_norm_reference(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(the sum in x's dtype, its RMS norm in float32)."""
    total = x if y is None else (x.float() + y.float()).to(x.dtype)
    return total, F.rms_norm(total.float(), weight.shape, weight.float(), eps)


def silu_and_mul(
    rows: Tensor, *, quantized: bool = False, interleaved: bool = False
) -> Tensor | QuantizedRows:
    """silu(a)·b of rows that hold a, then b, or both `interleaved`: (rows, 2 width) → (rows, width)."""
    count, width = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(count, width, dtype=FP8 if quantized else rows.dtype, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device) if quantized else rows
    _silu_and_mul_kernel[(count,)](
        rows,
        out,
        scales,
        INTERLEAVED=interleaved,
        QUANTIZE=quantized,
        **_shape(width),
    )
    return (out, scales) if quantized else out


def silu_and_mul_reference(rows: Tensor) -> Tensor:
    """The same in float32."""
    a, b = rows.float().chunk(2, dim=1)
    return F.silu(a) * b


def per_token_quant_fp8(rows: Tensor) -> QuantizedRows:
    """FP8 rows, each with a scale that maps its largest value to FP8's largest."""
    count, width = rows.shape
    out = torch.empty(count, width, dtype=FP8, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    _per_token_quant_fp8_kernel[(count,)](rows, out, scales, **_shape(width))
    return out, scales


def per_token_quant_fp8_reference(rows: Tensor) -> QuantizedRows:
    """The same. Weights use it too: they are quantized once and need no kernel."""
    values = rows.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=_TINY)
    return (values / scales).to(FP8), scales


def qk_norm_rope(
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
    # One program for each token; with few tokens one for each group of heads, or the device would be idle.
    programs = (q_heads + k_heads) // group if len(qkv) <= _FEW_TOKENS else 1
    _qk_norm_rope_kernel[(len(qkv), programs)](
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


def qk_norm_rope_reference(
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

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x.unflatten(1, (-1, dim)), (dim,), weight.float(), eps)
        a, b = x.chunk(2, dim=-1)
        return (x * cosine + torch.cat([-b, a], dim=-1) * sine).flatten(1)

    return torch.cat([rotated(q, weights[0]), rotated(k, weights[1]), v], dim=1)


def copy_rows(own: Tensor, pool: Tensor, keys: Tensor, copies: Tensor, count: Tensor) -> None:
    """Copy rows of `own` (tokens, width) and `pool` to rows of `keys` and `pool`, as the first `count` of `copies` say.

    `copies`: int32 (copies, 2), see `row.copy_plan`; `count`: int32 (1,), on the device too, since a CUDA graph
    copies as many rows as its inputs say. `own` may be columns of wider rows; `pool` and `keys` (rows, width) are contiguous.
    """
    width = own.shape[1]
    programs = max(_COPY_PROGRAMS, min(2048, len(own)))
    block = min(2048, triton.next_power_of_2(width))
    _copy_rows_kernel[(programs,)](
        own, own.stride(0), pool, keys, copies, count, WIDTH=width, BLOCK=block, num_warps=4
    )


def copy_rows_reference(own: Tensor, pool: Tensor, keys: Tensor, copies: Tensor, count: Tensor) -> None:
    """The same, a row at a time."""
    for source, target in copies[: int(count)].tolist():
        row = own[source] if source >= 0 else pool[-1 - source]
        if target >= 0:
            keys[target] = row
        else:
            pool[-1 - target] = row
