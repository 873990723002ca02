"""Gate and up as one product that gates in its epilogue, by quack-kernels where that is installed, in bf16 on Hopper.

The product's own 2 · width columns are then never written and read again: on an H200, with Qwen3-Embedding-4B's shapes,
it takes a tenth off these two steps and 5 % off the whole forward. FP8 gains nothing: what comes out has to be read once
more anyway, for the scales of its rows.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from embedq_consumer.engine.kernels.fused_ops import silu_and_mul_reference

__all__ = ["fuses", "gated_linear", "interleaved", "obstacle"]

# The fastest of twelve: two tiles alternate, so that the epilogue of one overlaps with the products of the other.
_TILE = {"tile_M": 128, "tile_N": 160, "cluster_M": 2, "cluster_N": 1, "pingpong": True}
_FEWEST_ROWS = 512
"""Below, PyTorch's product and a kernel for the gate are at least as fast."""
_LARGEST_ERROR = 0.01


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Both weights (width, inner) as one (2 · width, inner): gate's first row, up's first, gate's second and so on."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def fuses(rows: int) -> bool:
    """Whether `gated_linear` is faster than two kernels for this number of rows.

    quack-kernels caches a plan for each count that it sees, so there must be few counts; lengths of single texts are not
    among them.
    """
    return rows >= _FEWEST_ROWS and rows % 128 == 0


def gated_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(a)·b, bf16 (tokens, width), of rows · weight.T = a and b interleaved; the sums are float32.

    Waits for nothing, and can be captured as a CUDA graph after it ran once. A row's result does not depend on other rows, nor
    on how many there are.
    """
    out = torch.empty(len(rows), len(weight) // 2, dtype=rows.dtype, device=rows.device)
    epilogues = import_module("embedq_consumer.engine.kernels.gated_epilogue")
    epilogues.gate.gemm(rows, weight.t(), None, epi_args={"out": out}, b_kn=True, **_TILE)
    return out


@lru_cache
def obstacle(width: int, inner: int, device: torch.device) -> str | None:
    """Why weights (2 · width, inner) cannot go through `gated_linear`; None if they can. Compiles it, in two seconds, and
    checks its result."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "no_hopper_gpu"
    if find_spec("quack") is None:
        return "no_quack_kernels"
    generator = torch.Generator(device).manual_seed(0)
    rows, gate, up = (
        torch.randn(count, inner, device=device, generator=generator).to(torch.bfloat16)
        for count in (384, width, width)
    )
    gate, up = gate * inner**-0.5, up * inner**-0.5
    wanted = silu_and_mul_reference(rows.float() @ torch.cat([gate, up]).float().t())
    try:
        with torch.inference_mode():
            found = gated_linear(rows, interleaved(gate, up))
    except Exception as error:  # noqa: BLE001  versions refuse in different ways; two kernels do the same
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    right = bool((found - wanted).norm() <= _LARGEST_ERROR * wanted.norm())
    return None if right else "failed_check"
