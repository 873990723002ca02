"""Weights in bf16 or FP8, and the product of rows of tokens with either.

FP8 is e4m3 with a float32 scale for each row of a weight (an output channel) and for each row of activations (a token),
the latter computed anew each time: no calibration, and no token changes another's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedq_consumer.engine.kernels.fused_ops import QuantizedRows, per_token_quant_fp8_reference

__all__ = [
    "Weight",
    "fp8_available",
    "in_fp8",
    "linear",
    "select_rows",
    "split_channels",
    "weight_of",
]

Weight = Tensor | QuantizedRows
"""bf16 (out, inner), or its FP8 values (out, inner) with float32 scales (1, out)."""


def fp8_available(device: torch.device) -> bool:
    """Whether the device multiplies FP8 numbers with a scale for each row: from compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def weight_of(parts: list[Tensor], *, quantized: bool) -> Weight:
    """One weight of `parts`, concatenated; a copy, except of a single part that is not quantized."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not quantized:
        return whole
    values, scales = per_token_quant_fp8_reference(whole)
    return values, scales.view(1, -1)


def in_fp8(weight: Weight) -> bool:
    """Whether the weight is FP8, so that its rows have to be FP8, too."""
    return isinstance(weight, tuple)


def linear(rows: Tensor | QuantizedRows, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """bf16 (tokens, out). Rows and weight are both bf16 or both FP8; `bias` (out,) is bf16."""
    if isinstance(weight, tuple):
        if not isinstance(rows, tuple):
            raise TypeError("bf16 rows for an FP8 weight. This is a bug.")
        return torch._scaled_mm(
            rows[0],
            weight[0].t(),
            scale_a=rows[1],
            scale_b=weight[1],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    if isinstance(rows, tuple):
        raise TypeError("FP8 rows for a bf16 weight. This is a bug.")
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def split_channels(weight: Weight, first: int) -> tuple[Weight, Weight]:
    """The first `first` output channels of a weight, and the others."""
    if isinstance(weight, tuple):
        values, scales = weight
        return (values[:first], scales[:, :first]), (values[first:], scales[:, first:])
    return weight[:first], weight[first:]


def select_rows(rows: Tensor | QuantizedRows, indices: Tensor) -> Tensor | QuantizedRows:
    """The rows at `indices`."""
    if isinstance(rows, tuple):
        values, scales = rows  # bytes: PyTorch selects no FP8 rows
        picked = values.view(torch.uint8).index_select(0, indices).view(values.dtype)
        return picked, scales.index_select(0, indices)
    return rows.index_select(0, indices)
