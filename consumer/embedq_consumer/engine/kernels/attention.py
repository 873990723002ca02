"""Attention over a packed row: many sequences side by side, none sees another, nothing is padding.

transformers calls `packed_attention` in place of its own attention function for a model whose implementation is
`PACKED`. No mask function is registered under that name, so transformers builds no mask at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, Final

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PACKED",
    "SPARE_ROWS",
    "LengthRun",
    "Packing",
    "attend_runs",
    "cuda_kernel",
    "packed_attention",
    "rectangle",
    "register",
]

PACKED = "embedq_packed"
"""The name under which transformers knows `packed_attention`."""

_Varlen = Callable[..., Tensor]
# Arguments by which an architecture changes its attention in ways that the packed kernels do not compute.
_FOREIGN = ("position_bias", "s_aux")
SPARE_ROWS: Final = 15
"""Rows behind the last text's with which `attend_runs` makes the keys of every text a multiple of 16. PyTorch's attention on a CPU
takes a row's last exponentials one by one where they do not fill a vector: 63 keys take 1.65 times what 64 take, 13 keys 1.75 times
what 16 take (float32 and AVX-512, benchmarks/attention_cpu.py)."""
_WINDOW_QUERIES = 256
"""Queries in one call where attention has a window: fewer mean more calls, more mean keys that most queries do not see."""


class LengthRun(msgspec.Struct, frozen=True):
    """`count` consecutive sequences of equal `length`, from token `begin` on: one attention call serves them all."""

    begin: int
    count: int
    length: int

    @property
    def end(self) -> int:
        return self.begin + self.count * self.length


class Packing(msgspec.Struct, frozen=True):
    """Where each sequence lies in the row."""

    runs: tuple[LengthRun, ...]
    cu_seqlens: Tensor
    """int32 (sequences + 1,) on the model's device: 0, then the end of each sequence."""
    longest: int
    reaches: tuple[tuple[int, int], ...]
    """For each sequence where it ends in the row, and its last token's position, counted from 1 on."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, starts: Sequence[int] | None = None) -> Packing:
        """`starts`: the sequences' first positions, counted from 0 on; 0 by default."""
        if len(lengths) == 1 and starts is None and device.type == "cpu":
            return _alone(lengths[0])
        runs: list[LengthRun] = []
        ends = [0]
        for length in lengths:
            last = runs[-1] if runs else None
            if last is not None and last.length == length:
                runs[-1] = LengthRun(last.begin, last.count + 1, length)
            else:
                runs.append(LengthRun(ends[-1], 1, length))
            ends.append(ends[-1] + length)
        return cls(
            tuple(runs),
            torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True),
            max(lengths, default=0),
            tuple(
                (end, start + length)
                for end, start, length in zip(ends[1:], starts or [0] * len(lengths), lengths, strict=True)
            ),
        )


@lru_cache(maxsize=1024)
def _alone(length: int) -> Packing:
    """That of one text on a CPU, which is read only: a short one waits for each tensor that is made."""
    ends = torch.tensor([0, length], dtype=torch.int32)
    return Packing((LengthRun(0, 1, length),), ends, length, ((length, length),))


def register() -> None:
    """Register `PACKED` with transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (1, heads, tokens, head_dim) in, (1, tokens, heads, head_dim) out.

    Raises:
        NotImplementedError: the architecture asks for an attention that the packed kernels do not compute.
    """
    if packing is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not pass its keyword arguments on to its attention"
        )
    # No pair of tokens is further apart than the longest text.
    window = sliding_window if sliding_window is not None and packing.longest > sliding_window else None
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if attention_mask is not None or foreign:
        raise NotImplementedError(f"attention with {foreign or 'a mask of its own'}")
    causal = bool(getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if q.is_cuda and softcap is None:
        kernel = cuda_kernel(q.shape[1], k.shape[1], q.shape[2], causal, q.dtype, q.device, window)
        return kernel(q, k, v, packing.cu_seqlens, packing.longest, scale).unsqueeze(0), None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend_runs(q, k, v, out, packing.runs, causal=causal, scale=scale, window=window, softcap=softcap)
    return out.unsqueeze(0), None


# More than six: what an architecture may change in its attention, each by its own name.
def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    runs: Sequence[LengthRun],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: Callable[[int], Tensor] | None = None,
) -> None:
    """Fill `out` (tokens, heads, head_dim), one call of PyTorch's attention for each run of equal lengths.

    In a `window`, a token sees those that are fewer than `window` tokens away, which is what transformers means by
    `sliding_window`: itself and those before it if `causal`, else as many on both sides. With a `softcap`, scores approach
    it, and never exceed it. `bias` gives what is added to the scores of texts of a length: (heads, length, length); it
    goes with none of the others.

    `key` and `value` may have `SPARE_ROWS` more rows than `query`, of finite numbers. Where every token sees its whole text, that saves
    time on a CPU: a text's keys are then followed by its neighbor's first ones, which a mask leaves with no weight. A neighbor
    that is not finite spoils the text all the same.
    """
    whole = not causal and window is None and softcap is None
    spare = whole and query.device.type == "cpu" and len(key) >= len(query) + SPARE_ROWS
    for run in runs:
        keys = _filled(run.length) if spare else run.length
        q = rectangle(query, run).transpose(1, 2)
        k, v = (_texts(t, run, keys).transpose(1, 2) for t in (key, value))
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if bias is not None:
            added = F.pad(bias(run.length), (0, keys - run.length), value=-torch.inf)[None]
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        elif keys != run.length:
            unseen = _unseen(run.length, keys, q.dtype)
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=unseen, scale=scale)
        elif softcap is None and (window is None or run.length <= window):
            part = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        else:
            part = _by_queries(q, k, v, window or run.length, causal=causal, scale=scale, softcap=softcap)
        rectangle(out, run).copy_(part.transpose(1, 2))


def _by_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of (texts, heads, tokens, head_dim), some queries at a time with the keys that any of them sees.

    So a long text costs what its windows cost, in time and in memory.
    """
    length = query.shape[2]
    out = torch.empty_like(query)
    for begin in range(0, length, _WINDOW_QUERIES):
        end = min(begin + _WINDOW_QUERIES, length)
        first, last = max(begin - window + 1, 0), end if causal else min(end + window - 1, length)
        rows = torch.arange(begin, end, device=query.device).unsqueeze(1)
        distance = rows - torch.arange(first, last, device=query.device)
        seen = (distance < window) & (distance >= (0 if causal else 1 - window))
        q, k, v = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        if softcap is None:
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        else:
            scores = (q @ k.transpose(2, 3)).float().mul_(scale / softcap).tanh_().mul_(softcap)
            part = scores.masked_fill_(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v
        out[:, :, begin:end] = part
    return out


def _filled(length: int) -> int:
    """The next multiple of 16."""
    return length + -length % (SPARE_ROWS + 1)


@lru_cache(maxsize=1024)
def _unseen(length: int, keys: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, 1, keys): nothing is added to the scores of the first `length` keys, and of the others nothing is left."""
    mask = torch.zeros(1, 1, 1, keys, dtype=dtype)
    mask[..., length:] = -torch.inf
    return mask


def _texts(rows: Tensor, run: LengthRun, length: int) -> Tensor:
    """(texts, length, heads, head_dim) of the run's texts, each with the rows behind it that make it so long."""
    first = rows[run.begin :]
    stride = first.stride()
    return first.as_strided((run.count, length, *rows.shape[1:]), (run.length * stride[0], *stride))


def rectangle(row: Tensor, run: LengthRun) -> Tensor:
    return row[run.begin : run.end].view(run.count, run.length, *row.shape[1:])


@lru_cache
def cuda_kernel(
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> _Varlen:
    """The fastest kernel that computes this shape correctly: flash-attn-4 where installed, else PyTorch's own.

    Each is tried on a few random sequences first, since which shapes a kernel takes depends on the device and on the
    wheel; one that refuses or is wrong is skipped. It takes q, k, v (tokens, heads, head_dim), cumulated lengths, the
    longest length and the scale; and, where a sequence has fewer queries than keys, those of its last tokens, the queries'
    cumulated lengths and the longest of these, 1 by default.
    `window` is that of `attend_runs`.
    """
    lengths = [1, 7, 64, 130]
    if window is not None:
        lengths += [window, window + 1, 2 * window + 70]
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), n, head_dim, device=device, dtype=dtype, generator=generator)
        for n in (heads, kv_heads, kv_heads)
    )
    packing = Packing.of(lengths, device)
    scale = head_dim**-0.5
    expected = torch.empty(q.shape, device=device, dtype=torch.float32)
    attend_runs(
        q.float(), k.float(), v.float(), expected, packing.runs, causal=causal, scale=scale, window=window
    )
    # The same with fewer queries than keys, of the last tokens: what a shared prefix leaves of a text.
    fewer = Packing.of([-(-n // 3) for n in lengths], device)
    tail = torch.cat(
        [
            torch.arange(end - -(-n // 3), end)
            for n, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)
        ]
    ).to(device)
    refused = []
    for name, make in (("flash-attn-4", _flash_attn_4), ("torch varlen_attn", _torch_varlen)):
        try:
            kernel = make(heads // kv_heads, causal, window)
            got = kernel(q, k, v, packing.cu_seqlens, packing.longest, scale)
            torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)
            if causal and window is None:
                got = kernel(
                    q[tail],
                    k,
                    v,
                    packing.cu_seqlens,
                    packing.longest,
                    scale,
                    fewer.cu_seqlens,
                    fewer.longest,
                )
                torch.testing.assert_close(got.float(), expected[tail], atol=0.03, rtol=0.03)
        except Exception as error:  # noqa: BLE001  every kernel has its own way to refuse a shape
            refused.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            return kernel
    raise NotImplementedError(
        f"no attention kernel for head_dim {head_dim} and {dtype}: {'; '.join(refused)}"
    )


def _flash_attn_4(group: int, causal: bool, window: int | None) -> _Varlen:
    flash_attn_varlen_func = import_module("flash_attn.cute").flash_attn_varlen_func
    options: dict[str, Any] = {"causal": causal}
    if window is not None:
        options = {"window_size": _sides(window, causal)}

    def flash_attn_4(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float,
        cu_seqlens_q: Tensor | None = None,
        longest_q: int = 1,
    ) -> Tensor:
        out: Any = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens if cu_seqlens_q is None else cu_seqlens_q,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest if cu_seqlens_q is None else longest_q,
            max_seqlen_k=longest,
            softmax_scale=scale,
            **options,
        )
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended

    return flash_attn_4


def _sides(window: int, causal: bool) -> tuple[int, int]:
    """How many tokens a kernel lets a token see on its left and on its right."""
    return window - 1, 0 if causal else window - 1


def _torch_varlen(group: int, causal: bool, window: int | None) -> _Varlen:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if window is not None:
        options["window_size"] = _sides(window, causal)
    elif causal:
        options |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = group > 1 and "enable_gqa" in known
    if grouped:
        options["enable_gqa"] = True

    def torch_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float,
        cu_seqlens_q: Tensor | None = None,
        longest_q: int = 1,
    ) -> Tensor:
        if group > 1 and not grouped:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        queries, most = (cu_seqlens, longest) if cu_seqlens_q is None else (cu_seqlens_q, longest_q)
        attended = varlen_attn(q, k, v, queries, cu_seqlens, most, longest, scale=scale, **options)
        assert isinstance(attended, Tensor)  # a tuple comes only when more is asked for
        return attended

    return torch_varlen
