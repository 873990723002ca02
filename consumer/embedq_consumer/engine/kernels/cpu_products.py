"""How rows are multiplied with a layer's weights on a CPU: as they are, laid out once for few tokens, or in bf16.

`addmm` lays a weight out anew at each call. For many tokens that is little beside the product itself; for one short text it is most
of the forward. Copies that oneDNN has laid out once are kept beside the weights, which rows of more tokens still use.
In bf16 the copies take the weights' place: processors with instructions for it (AMX, AVX512_BF16, Arm's BF16) multiply several
times as fast as in float32. What stands between the products stays in float32 there, so that only what they multiply is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FEW_TOKENS",
    "FEW_TOKENS_BESIDE_BF16",
    "PACKED_BYTES",
    "Bf16Products",
    "PackedProducts",
    "PlainProducts",
    "Products",
    "copyable",
    "fast_bf16",
    "packable",
    "packed",
    "packed_linear",
    "rounded",
]

FEW_TOKENS: Final = 128
"""The largest row that runs with copies of the weights. On two cores of an EPYC 7003 MiniLM's forward takes 0.69 of the time for 16
tokens and 0.9 for 128; for 256 `addmm` is ahead (benchmarks/one_text.py)."""
FEW_TOKENS_BESIDE_BF16: Final = 8
"""For each thread: rows of so many tokens run in ONNX Runtime, in float32, where the others run in bf16. With 16 threads 13 tokens take
2.5 ms there and 7.7 in bf16, which wakes all threads a hundred times, 50 take 3.3 and 7.6; with 2 threads 13 take the same, and 64
take twice as long."""
PACKED_BYTES: Final = 512 << 20
"""What the copies of a model may take: those of MiniLM are 43 MB, of a BERT-base 340 MB. A larger model does without; a short
text takes it so long that few think of milliseconds."""

_FRESH_BYTES: Final = 16 << 20
"""The largest tensor that a packed product, which cannot be told where to put its result, makes: malloc has pages at hand for it. What
is larger would be paged in by the kernel each time, which costs more than what is computed."""

Pair = tuple[Tensor, Tensor]
"""Weight (out, in), or a packed one, and bias (out,)."""


class Products(Protocol):
    """The products of one layer. `x` and `residual` are (tokens, hidden) and may be changed, but `linear`'s `x`; `scratch` may be
    used for what is computed, and has as many rows."""

    def linear(self, x: Tensor, layer: Pair, out: Tensor) -> None:
        """Fill `out`, (tokens, out), with what attention takes."""

    def added(self, x: Tensor, layer: Pair, residual: Tensor, scratch: Tensor) -> Tensor:
        """The product plus `residual`, in whose dtype the sum is."""

    def feed_forward(self, x: Tensor, up: Pair, down: Pair, wide: Tensor, scratch: Tensor) -> Tensor:
        """`x` plus the product with `down` of the exact GELU of that with `up`; `wide` is scratch, too, (tokens, inner)."""


class PlainProducts:
    """In the weights' own dtype."""

    def linear(self, x: Tensor, layer: Pair, out: Tensor) -> None:
        weight, bias = layer
        torch.addmm(bias, x, weight.t(), out=out)

    def added(self, x: Tensor, layer: Pair, residual: Tensor, scratch: Tensor) -> Tensor:
        self.linear(x, layer, scratch)
        return scratch.add_(residual)

    def feed_forward(self, x: Tensor, up: Pair, down: Pair, wide: Tensor, scratch: Tensor) -> Tensor:
        self.linear(x, up, wide)
        torch.ops.aten.gelu_(wide)
        return self.added(wide, down, x, scratch)


class PackedProducts:
    """In float32, with packed weights; no scratch is used, since what few tokens give is small."""

    def linear(self, x: Tensor, layer: Pair, out: Tensor) -> None:
        out.copy_(packed_linear(x, *layer))

    def added(self, x: Tensor, layer: Pair, residual: Tensor, scratch: Tensor) -> Tensor:
        return residual.add_(packed_linear(x, *layer))

    def feed_forward(self, x: Tensor, up: Pair, down: Pair, wide: Tensor, scratch: Tensor) -> Tensor:
        return self.added(packed_linear(x, *up, gelu=True), down, x, scratch)


class Bf16Products:
    """What is multiplied is rounded to bf16, and sums are float32: `residual`, and what is added to it. `packs`: weights are packed.

    What attention takes, and what goes from one product into the next, is bf16.
    """

    def __init__(self, *, packs: bool) -> None:
        self._packs = packs

    def linear(self, x: Tensor, layer: Pair, out: Tensor) -> None:
        for rows in _tiles(x, layer):
            out[rows] = self._product(x[rows], layer)

    def added(self, x: Tensor, layer: Pair, residual: Tensor, scratch: Tensor) -> Tensor:
        for rows in _tiles(x, layer):
            residual[rows].add_(self._product(x[rows], layer))
        return residual

    def feed_forward(self, x: Tensor, up: Pair, down: Pair, wide: Tensor, scratch: Tensor) -> Tensor:
        for rows in _tiles(x, up):
            x[rows].add_(self._product(self._product(x[rows], up, gelu=True), down))
        return x

    def _product(self, x: Tensor, layer: Pair, *, gelu: bool = False) -> Tensor:
        rows = x.to(torch.bfloat16)
        if self._packs:
            return packed_linear(rows, *layer, gelu=gelu)
        product = F.linear(rows, *layer)
        return F.gelu(product) if gelu else product


def _tiles(x: Tensor, layer: Pair) -> Iterator[slice]:
    """The rows of `x` in parts of which the product with `layer` stays below `_FRESH_BYTES`."""
    bias = layer[1]
    step = max(1, _FRESH_BYTES // bias.nbytes)
    return (slice(begin, begin + step) for begin in range(0, len(x), step))


def copyable(weights: Sequence[Tensor]) -> bool:
    """Whether copies of these weights for a CPU's few tokens are small enough, and of a kind that is worth it."""
    return sum(weight.nbytes for weight in weights) <= PACKED_BYTES and all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights
    )


def packable(weights: Sequence[Tensor]) -> bool:
    """Whether these weights can be packed, within `PACKED_BYTES`, and their products are right on this processor."""
    return copyable(weights) and _right(weights[0], tolerance=1e-4)


def packed(weight: Tensor) -> Tensor:
    """A copy of `weight` (out, in) in the layout of oneDNN, for `packed_linear` alone."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # noqa: SLF001  torch.compile calls it, too
    return copy


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """`F.linear` of a packed `weight`, (tokens, in) to (tokens, out), all of one dtype; `gelu`: the exact one behind it."""
    attribute, kind = ("gelu", "none") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001  likewise
        x, weight, bias, attribute, [], kind
    )
    return product


def rounded(layer: Pair, *, packs: bool) -> Pair:
    """A copy of a layer of float32 for `Bf16Products`."""
    weight, bias = (part.to(torch.bfloat16) for part in layer)
    return (packed(weight) if packs else weight), bias


def fast_bf16(weight: Tensor) -> bool:
    """Whether this processor multiplies with packed weights like `weight`, float32 (out, in), in bf16."""
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return bool(supported) and _right(weight.to(torch.bfloat16), tolerance=0.05)


def _right(weight: Tensor, *, tolerance: float) -> bool:
    """Try one, in the dtype of `weight`: what a build of PyTorch lacks, or computes with fewer bits, shows here."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, weight.shape[1], generator=generator).to(weight.dtype)
    bias = torch.randn(weight.shape[0], generator=generator).to(weight.dtype)
    exact = F.linear(x.float(), weight.float(), bias.float())
    try:
        copy = packed(weight)
        found = [packed_linear(x, copy, bias), packed_linear(x, copy, bias, gelu=True)]
    except (AttributeError, RuntimeError):  # no such operator, or none that this processor has
        return False
    return all(
        torch.allclose(each.float(), wanted, rtol=tolerance / 10, atol=tolerance)
        for each, wanted in zip(found, (exact, F.gelu(exact)), strict=True)
    )
