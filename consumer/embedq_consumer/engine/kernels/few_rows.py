"""Products of few tokens on a CPU, with weights that oneDNN has laid out for the processor once.

`addmm` lays a weight out anew at each call. For many tokens that is nothing beside the product itself; for one short text it
is most of the forward. The packed copies are kept beside the weights, which rows of more tokens still use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = ["FEW_TOKENS", "PACKED_BYTES", "copyable", "packable", "packed", "packed_linear"]

FEW_TOKENS: Final = 128
"""The largest row that runs with copies of the weights. On two cores of an EPYC 7003 MiniLM's forward takes 0.69 of the time for 16
tokens and 0.9 for 128; for 256 `addmm` is ahead (benchmarks/one_text.py)."""
PACKED_BYTES: Final = 512 << 20
"""What the copies of a model may take: those of MiniLM are 43 MB, of a BERT-base 340 MB. A larger model does without; a short
text takes it so long that few think of milliseconds."""


def copyable(weights: Sequence[Tensor]) -> bool:
    """Whether copies of these weights for a CPU's few tokens are small enough, and of a kind that is worth it."""
    return sum(weight.nbytes for weight in weights) <= PACKED_BYTES and all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights
    )


def packable(weights: Sequence[Tensor]) -> bool:
    """Whether these weights can be packed, within `PACKED_BYTES`, and their products are right on this processor."""
    if not copyable(weights):
        return False
    return torch.backends.mkldnn.is_available() and _right(weights[0])


def packed(weight: Tensor) -> Tensor:
    """A copy of `weight` (out, in) in the layout of oneDNN, for `packed_linear` alone."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # noqa: SLF001  torch.compile calls it, too
    return copy


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` of a packed `weight`: float32 (tokens, in) to (tokens, out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001  likewise
        x, weight, bias, "none", [], ""
    )
    return product


def _right(weight: Tensor) -> bool:
    """Try one: what a build of PyTorch lacks, or computes with fewer bits, shows here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, weight.shape[1], generator=generator)
    bias = torch.randn(weight.shape[0], generator=generator)
    try:
        found = packed_linear(x, packed(weight), bias)
    except (AttributeError, RuntimeError):  # no such operator, or none that this processor has
        return False
    return torch.allclose(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
