"""Skinny GEMMs and attention: for so few tokens that only reading the weights and launching kernels takes time.

Each has its definition in plain PyTorch, as in fused_ops.py.
"""

# Triton's language is not Python's: what its kernels name, they neither annotate nor keep to one type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from embedq_consumer.engine.kernels.fused_ops import (
    QuantizedRows,
    norm_rope_halves,
    qk_norm_rope_reference,
    silu_and_mul_reference,
)

__all__ = [
    "ATTENTION_ROWS",
    "skinny_attention",
    "skinny_attention_reference",
    "skinny_linear",
    "skinny_linear_reference",
    "skinny_plan",
]

ATTENTION_ROWS = (16, 64)
"""Row sizes that `skinny_attention` takes: all of a row's keys fit one program."""

_TILES = {
    (16, False): {
        "wide": (64, 256, 4, 4),
        "gated": (16, 128, 6, 2),
        "square": (32, 256, 5, 4),
        "deep": (16, 256, 6, 2),
    },
    (16, True): {
        "wide": (32, 256, 5, 4),
        "gated": (32, 256, 3, 4),
        "square": (16, 512, 4, 2),
        "deep": (16, 512, 4, 2),
    },
    (64, True): {
        "wide": (64, 256, 4, 4),
        "gated": (32, 256, 3, 4),
        "square": (32, 256, 5, 4),
        "deep": (32, 512, 4, 4),
    },
}
"""(columns, step, stages, warps) by rows, FP8 or not, and the product's form: the fastest of five to seven candidates each on an H200,
with the shapes of Qwen3-Embedding-4B. bf16 gains at 16 rows only, FP8 up to 64, for which the library has no small tiles."""
_LEAST_WIDTH = 2048
"""A narrower product has too few columns to keep the device busy this way."""


@triton.jit
def _skinny_attention_kernel(
    qkv,
    positions,
    cosines,
    sines,
    q_weight,
    k_weight,
    out,
    eps,
    scale,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head = tl.program_id(0)
    kv_head = head // (Q_HEADS // KV_HEADS)
    DIM: tl.constexpr = 2 * HALF
    rows = tl.arange(0, ROWS)
    halves = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + rows)
    angle = position.to(tl.int64)[:, None] * HALF + halves
    cosine = tl.load(cosines + angle)
    sine = tl.load(sines + angle)
    row = qkv + rows[:, None] * ((Q_HEADS + 2 * KV_HEADS) * DIM)
    q1, q2 = norm_rope_halves(row + head * DIM + halves, q_weight, cosine, sine, eps, HALF)
    k1, k2 = norm_rope_halves(row + (Q_HEADS + kv_head) * DIM + halves, k_weight, cosine, sine, eps, HALF)
    scores = tl.dot(q1, tl.trans(k1))
    scores = tl.dot(q2, tl.trans(k2), scores) * (scale * 1.4426950408889634)
    # A text begins where its positions do, and positions count up: so this is one number for each text.
    begin = rows - position
    seen = begin[:, None] == begin[None, :]
    if CAUSAL:
        seen = seen & (rows[None, :] <= rows[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    shares = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(shares, 1)
    channels = tl.arange(0, DIM)[None, :]
    v = tl.load(row + (Q_HEADS + KV_HEADS + kv_head) * DIM + channels)
    attended = tl.dot(shares.to(v.dtype), v) / total[:, None]
    tl.store(out + rows[:, None] * (Q_HEADS * DIM) + head * DIM + channels, attended.to(out.dtype.element_ty))


@triton.jit
def _skinny_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    residual,
    out,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, STEP)
    x_pointers = x + rows[:, None] * INNER + steps[None, :]
    if INTERLEAVED:
        # Gate and up of a column are neighbors: one product over both reads the weight as it lies.
        channels = tl.program_id(0).to(tl.int64) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        w_pointers = weight + channels[None, :] * INNER + steps[:, None]
        both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for begin in range(0, INNER, STEP):
            both = tl.dot(tl.load(x_pointers + begin), tl.load(w_pointers + begin), both)
        if SCALED:
            both = both * tl.load(x_scales + rows)[:, None] * tl.load(weight_scales + channels)[None, :]
        total, gated = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        w_pointers = weight + columns.to(tl.int64)[None, :] * INNER + steps[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        gated = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, INNER, STEP):
            part = tl.load(x_pointers + begin)
            total = tl.dot(part, tl.load(w_pointers + begin), total)
            if GATE:
                gated = tl.dot(part, tl.load(w_pointers + WIDTH * INNER + begin), gated)
        if SCALED:
            row_scale = tl.load(x_scales + rows)[:, None]
            total = total * row_scale * tl.load(weight_scales + columns)[None, :]
            if GATE:
                gated = gated * row_scale * tl.load(weight_scales + WIDTH + columns)[None, :]
    if GATE:
        root = tl.rsqrt(1.0 + tl.exp2(total * -1.4426950408889634))
        total = total * gated * (root * root)
    offsets = rows[:, None] * WIDTH + columns[None, :]
    if ADD:
        total += tl.load(residual + offsets).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty))


def skinny_plan(rows: int, width: int, inner: int, *, gated: bool, scaled: bool) -> dict[str, int] | None:
    """How `skinny_linear` cuts a product of few rows, or None where the library's own product serves as well."""
    tiles = _TILES.get((rows, scaled))
    if tiles is None or width < _LEAST_WIDTH:
        return None
    kind = "gated" if gated else "wide" if width > 4096 else "deep" if inner > 2 * width else "square"
    columns, step, stages, warps = tiles[kind]
    if width % columns or inner % step:
        return None
    return {"COLUMNS": columns, "STEP": step, "num_stages": stages, "num_warps": warps}


def skinny_linear(
    x: Tensor | QuantizedRows,
    weight: Tensor | QuantizedRows,
    plan: dict[str, int],
    *,
    gated: bool = False,
    interleaved: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """One product of few rows at the speed of reading its weights, followed by the gate or the residual.

    x (rows, inner) and weight (out, inner), both bf16 or both FP8; the result is bf16. `gated`: the weight holds gate,
    then up, or both row by row (`interleaved`), and half as many columns come out.
    """
    values, scales = x if isinstance(x, tuple) else (x, x)
    matrix, matrix_scales = weight if isinstance(weight, tuple) else (weight, weight)
    rows, inner = values.shape
    width = matrix.shape[0] // 2 if gated else matrix.shape[0]
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=values.device)
    _skinny_kernel[(width // plan["COLUMNS"],)](
        values,
        scales,
        matrix,
        matrix_scales,
        out if residual is None else residual,
        out,
        WIDTH=width,
        INNER=inner,
        ROWS=rows,
        GATE=gated,
        INTERLEAVED=interleaved,
        ADD=residual is not None,
        SCALED=isinstance(weight, tuple),
        **plan,
    )
    return out


def skinny_linear_reference(
    x: Tensor | QuantizedRows,
    weight: Tensor | QuantizedRows,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in float32."""
    value = x[0].float() * x[1] if isinstance(x, tuple) else x.float()
    matrix = weight[0].float() * weight[1].view(-1, 1) if isinstance(weight, tuple) else weight.float()
    value = value @ matrix.t()
    if gated:
        value = silu_and_mul_reference(value)
    return value if residual is None else value + residual.float()


def skinny_attention(
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    eps: float,
    *,
    causal: bool,
) -> Tensor:
    """`qk_norm_rope`, then attention: (tokens, q_heads · head_dim) of one of ATTENTION_ROWS tokens.

    A text is where `positions` count up from 0, so the row must hold all of its tokens; `qkv` stays unchanged.
    """
    q_heads, kv_heads = heads
    half = rotation[0].shape[1]
    out = torch.empty(len(qkv), q_heads * 2 * half, dtype=qkv.dtype, device=qkv.device)
    _skinny_attention_kernel[(q_heads,)](
        qkv,
        positions,
        *rotation,
        *weights,
        out,
        eps,
        (2 * half) ** -0.5,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=half,
        ROWS=len(qkv),
        CAUSAL=causal,
        num_warps=4,
    )
    return out


def skinny_attention_reference(
    qkv: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    eps: float,
    *,
    causal: bool,
) -> Tensor:
    """The same in float32, text by text."""
    q_heads, kv_heads = heads
    dim = 2 * rotation[0].shape[1]
    rotated = qk_norm_rope_reference(qkv, positions, rotation, weights, heads, eps)
    begins = [row for row, position in enumerate(positions.tolist()) if position == 0]
    found = []
    for begin, end in zip(begins, [*begins[1:], len(qkv)], strict=True):
        q, k, v = (
            part.unflatten(1, (-1, dim)).transpose(0, 1)
            for part in rotated[begin:end].split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        k, v = (part.repeat_interleave(q_heads // kv_heads, dim=0) for part in (k, v))
        found.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1))
    return torch.cat(found)
