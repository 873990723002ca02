"""Whether a model fits into a device's memory, from its files' headers alone, and the arithmetic if it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.model_directory import TensorSlice

__all__ = ["PART_TOKENS", "DeviceMemory", "MemoryEstimate", "need_of", "refuse_if_too_large"]

PART_TOKENS: Final = 16_384
"""What runs at once of a larger batch on CUDA: 8,192 tokens were 1 % slower in FP8 on an H200, 4,096 were 3 %.
Whether a longer text fits too is tried out (budget.py), and refuses no model."""

_WIDTH: Final = {"bf16": 2, "float32": 4}
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_IDLE: Final = ("lm_head.", "cls.", "score.")
"""Heads that the base model has no place for."""
_PRODUCT: Final = re.compile(r"(^|\.)(layers?|h)\.\d+\..*weight$")


class MemoryEstimate(msgspec.Struct, frozen=True):
    """Bytes that a model takes on its device. Lower bounds: what is refused for them cannot run."""

    parameters: int
    dtype: str
    weights: int
    """Held while it serves."""
    loading: int
    """Held at once while it loads, before any text runs."""
    activations: int
    """Held beside the weights while `tokens` tokens run."""
    tokens: int

    @property
    def total(self) -> int:
        return max(self.loading, self.weights + self.activations)


class DeviceMemory(msgspec.Struct, frozen=True):
    """Bytes of a device's memory."""

    device: str
    free: int
    total: int


def need_of(
    tensors: Sequence[TensorSlice],
    config: Mapping[str, Any],
    *,
    dtype: str,
    quantized: bool,
) -> MemoryEstimate:
    """What the weights in `tensors` take in `dtype` ("bf16" or "float32"), and running `PART_TOKENS` beside them.

    Weights: numbers times their width; integers as they lie in the file. With `quantized`, the products' weights inside
    the layers take one byte a number, but only once they have been on the device as bf16, layer by layer.
    Activations, for each token: the residual stream, what is added to it and its norm (3 · hidden), and beside them the
    larger of query, key, value and attention's output, and gate, up and their product (3 · inner); in `dtype`.
    """
    width = _WIDTH[dtype]
    parameters = weights = loading = 0
    for tensor in tensors:
        if tensor.name.startswith(_IDLE):
            continue
        if tensor.dtype not in _FLOATS:
            weights += tensor.end - tensor.begin
            loading += tensor.end - tensor.begin
            continue
        count = math.prod(tensor.shape)
        parameters += count
        loading += width * count
        product = len(tensor.shape) == 2 and _PRODUCT.search(tensor.name)
        weights += count + 4 * tensor.shape[0] if quantized and product else width * count
    return MemoryEstimate(
        parameters=parameters,
        dtype=dtype,
        weights=weights,
        loading=loading if quantized else weights,
        activations=width * _numbers_a_token(config) * PART_TOKENS,
        tokens=PART_TOKENS,
    )


def refuse_if_too_large(file: str, need: MemoryEstimate, room: DeviceMemory) -> None:
    """Compare.

    Raises:
        ModelError: with the arithmetic.
    """
    if need.total <= room.free:
        return
    if need.loading > need.weights + need.activations:
        parts = f"{_gb(need.loading)} for {need.parameters:,} parameters in {need.dtype}, before they are quantized"
    else:
        held = f"{need.dtype}, quantized" if need.loading > need.weights else need.dtype
        parts = f"{_gb(need.weights)} for weights ({need.parameters:,} parameters in {held})"
        if need.activations:
            parts += f" and at least {_gb(need.activations)} for activations of {need.tokens:,} tokens"
    raise ModelError(
        f"{file}: needs {parts}; {room.device} has {_gb(room.free)} free of {room.total / 1e9:.1f}"
    )


def _numbers_a_token(config: Mapping[str, Any]) -> int:
    """Numbers held at once for each token; 0 for what the configuration does not say."""
    text = config.get("text_config")
    known = text if isinstance(text, dict) else config

    def of(name: str, default: int = 0) -> int:
        value = known.get(name, default)
        return value if isinstance(value, int) else default

    hidden, heads = of("hidden_size"), of("num_attention_heads", 1)
    dim = of("head_dim", hidden // max(1, heads))
    attention = (2 * heads + 2 * of("num_key_value_heads", heads)) * dim
    return 3 * hidden + max(attention, 3 * of("intermediate_size"))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
