"""Whether a model fits into a device's memory, from its files' headers alone; if not, the arithmetic."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from embedq_consumer.engine.api import ModelError, Quantization
from embedq_consumer.engine.row import PART_TOKENS
from embedq_consumer.engine.safety.headers import TensorSlice

__all__ = [
    "PART_TOKENS",
    "DeviceMemory",
    "MemoryEstimate",
    "estimate_of",
    "host_memory",
    "refuse_if_too_large",
]


_WIDTH: Final = {"bf16": 2, "float32": 4}
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_IDLE: Final = ("lm_head.", "cls.", "score.")
"""Heads that the base model does not have."""
_PRODUCT: Final = re.compile(r"(^|\.)(layers?|h)\.\d+\..*weight$")


class MemoryEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a model takes on its device. Lower bounds: a model that is refused for them cannot run."""

    parameters: int
    dtype: str
    weights: int
    """While it serves."""
    loading: int
    """At most while it loads, before any text runs."""
    activations: int
    """In addition to the weights while `tokens` tokens run."""
    tokens: int

    @property
    def total(self) -> int:
        return max(self.loading, self.weights + self.activations)


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a device's memory."""

    device: str
    free: int
    total: int


def estimate_of(
    tensors: Sequence[TensorSlice],
    config: Mapping[str, Any],
    *,
    dtype: str,
    quantization: Quantization,
) -> MemoryEstimate:
    """What the weights in `tensors` take in `dtype` ("bf16" or "float32"), and running `PART_TOKENS` with them.

    Weights: numbers times their width; integers as they lie in the file. With "fp8", the products' weights inside the layers take
    one byte a number, with "bf16" all numbers two, but only after they have been on the device in `dtype`.
    Activations, for each token: the residual stream, what is added to it and its norm (3 · hidden), plus the larger of query, key, value and attention's output, and gate, up and their product (3 · inner); in `dtype`.
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
        if quantization == "fp8" and product:
            weights += count + 4 * tensor.shape[0]
        else:
            weights += count * (_WIDTH["bf16"] if quantization == "bf16" else width)
    return MemoryEstimate(
        parameters=parameters,
        dtype=dtype,
        weights=weights,
        loading=weights if quantization == "none" else loading,
        activations=width * _numbers_a_token(config) * PART_TOKENS,
        tokens=PART_TOKENS,
    )


def refuse_if_too_large(file: str, estimate: MemoryEstimate, available: DeviceMemory) -> None:
    """
    Raises:
        ModelError: the estimate exceeds what is free; the message gives the arithmetic.
    """
    if estimate.total <= available.free:
        return
    if estimate.loading > estimate.weights + estimate.activations:
        parts = f"{_gb(estimate.loading)} for {estimate.parameters:,} parameters in {estimate.dtype}, before they are quantized"
    else:
        held = f"{estimate.dtype}, quantized" if estimate.loading > estimate.weights else estimate.dtype
        parts = f"{_gb(estimate.weights)} for weights ({estimate.parameters:,} parameters in {held})"
        if estimate.activations:
            parts += (
                f" and at least {_gb(estimate.activations)} for activations of {estimate.tokens:,} tokens"
            )
    raise ModelError(
        f"{file}: needs {parts}; {available.device} has {_gb(available.free)} free of {available.total / 1e9:.1f}"
    )


def host_memory(proc: Path = Path("/proc"), control_group: Path = Path("/sys/fs/cgroup")) -> DeviceMemory:
    """This machine's memory, or what its container may have of it; what only caches files counts as free.

    Of control groups, version 2 counts, which containers have had for years. Where the kernel says nothing, all is free.
    """
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = _numbers(proc / "meminfo")
    if "MemAvailable:" in said:
        free = 1024 * said["MemAvailable:"]
    limit = _text(control_group / "memory.max").strip()
    if limit.isdecimal():
        used = int(_text(control_group / "memory.current") or 0)
        cached = _numbers(control_group / "memory.stat").get("inactive_file", 0)
        total = min(total, int(limit))
        free = min(free, max(0, int(limit) - used + cached))
    return DeviceMemory(device="the machine", free=free, total=total)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's, a name and a number a line."""
    lines = (line.split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _text(file: Path) -> str:
    """Empty where there is no such file."""
    try:
        return file.read_text()
    except OSError:
        return ""


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
