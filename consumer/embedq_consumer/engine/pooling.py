"""How a text's hidden states become its vector: one class for each pooling, and `POOLINGS` by name.

A new pooling is a class here. All else that depends on the pooling asks it: which token ends a span, whether spans have
vectors at all, and what runs on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.row import Row

__all__ = ["POOLINGS", "Pooling", "pooling_of"]

Spans = npt.NDArray[np.int64]
"""(spans, 2): ranges `[begin, end)` of a row's tokens."""


class Pooling(ABC):
    """One way to pool. Vectors are float32, whatever the hidden states are."""

    name: str
    """As in a model's `1_Pooling/config.json`, and as it counts for the model version."""
    needs_last_norm: bool = False
    """Whether the model's last norm may run on the pooled tokens alone, in float32, since all others are dropped."""
    supports_spans: bool = True
    """Whether a span in the middle of a text can have a vector."""
    end_token: bool = False
    """Whether the last span of a window includes the special tokens after the text."""

    def width(self, hidden: int) -> int:
        """Components of a vector, where a hidden state has `hidden`."""
        return hidden

    @abstractmethod
    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(tokens, hidden), and int32 (sequences + 1,) → float32 (sequences, hidden)."""

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        """(tokens, hidden) → float32 (spans, hidden)."""
        raise RuntimeError(f"{self.name} pooling has no vectors for spans. This is a bug.")

    def picked(self, row: Row) -> Tensor | None:
        """The one token of each slot that its vector comes from, (slots,); None if all of them count.

        Runs inside a CUDA graph, as does `pool_row`.
        """
        return None

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        """Pool all tokens of a row on the device into `out`, float32 (slots, hidden); zeros for a slot without a text.

        Needed where `picked` gives None. `out` may be part of a wider tensor.
        """
        raise RuntimeError(f"{self.name} pooling picks one token of each text. This is a bug.")


class _FirstToken(Pooling):
    name = "cls"
    supports_spans = False

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return hidden[cu_seqlens[:-1].long()].float()

    def picked(self, row: Row) -> Tensor:
        # A slot without a text begins after the row's end.
        return row.cu_seqlens[:-1].clamp(max=len(row.ids) - 1)


class _Mean(Pooling):
    name = "mean"

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return _reduced("mean", hidden.float(), cu_seqlens)

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        inside = np.concatenate([np.arange(begin, end) for begin, end in spans])
        tokens = hidden[torch.from_numpy(inside).to(hidden.device)].float()
        lengths = torch.from_numpy(spans[:, 1] - spans[:, 0]).to(hidden.device)
        return torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        from embedq_consumer.engine.kernels.bert_ops import mean_of_slots  # Triton, which a CPU may lack

        if out.is_contiguous():
            mean_of_slots(hidden, row.cu_seqlens, out)
        else:
            whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            mean_of_slots(hidden, row.cu_seqlens, whole)
            out.copy_(whole)


class _MeanSqrtLength(_Mean):
    """The sum over the square root of the number of tokens: the mean, and longer for longer texts."""

    name = "mean_sqrt_len_tokens"

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().pool(hidden, cu_seqlens) * _lengths(cu_seqlens).sqrt()

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        lengths = torch.from_numpy(spans[:, 1:] - spans[:, :1]).to(hidden.device)
        return super().pool_spans(hidden, spans) * lengths.float().sqrt()

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        super().pool_row(hidden, row, out)
        out.mul_(_lengths(row.cu_seqlens).sqrt())


class _WeightedMean(_Mean):
    """The mean in which a text's token number n, from 1 on, weighs n.

    Of a text of n tokens, weights sum up to n(n + 1) / 2: so it is the mean of weighted tokens times 2 / (n + 1).
    """

    name = "weightedmean"
    supports_spans = False

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().long()
        begins = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        weights = torch.arange(1, len(hidden) + 1, device=hidden.device) - begins
        weighted = hidden.float() * weights.unsqueeze(1)
        return super().pool(weighted, cu_seqlens) * (2 / (_lengths(cu_seqlens) + 1))

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        # What a token weighs is its place in the whole text.
        return Pooling.pool_spans(self, hidden, spans)

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        super().pool_row(hidden.float() * (row.positions + 1).unsqueeze(1), row, out)
        out.mul_(2 / (_lengths(row.cu_seqlens) + 1))


class _Max(Pooling):
    """The largest value of each component."""

    name = "max"

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return _reduced("max", hidden.float(), cu_seqlens)

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        return torch.stack([hidden[begin:end].float().amax(0) for begin, end in spans.tolist()])

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        tokens = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        slots = torch.searchsorted(row.cu_seqlens[1:], tokens, right=True).clamp_(max=len(out) - 1)
        out.zero_()
        slots = slots.unsqueeze(1).expand(hidden.shape)
        out.scatter_reduce_(0, slots, hidden.float(), "amax", include_self=False)


class _LastToken(Pooling):
    name = "lasttoken"
    needs_last_norm = True
    end_token = True

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return hidden[cu_seqlens[1:].long() - 1].float()

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        return hidden[torch.from_numpy(spans[:, 1] - 1).to(hidden.device)].float()

    def picked(self, row: Row) -> Tensor:
        return row.last


class _Concatenated(Pooling):
    """The vectors of several poolings, one after the other."""

    def __init__(self, parts: Sequence[Pooling]) -> None:
        self._parts = parts
        self.name = _JOINT.join(part.name for part in parts)
        self.supports_spans = all(part.supports_spans for part in parts)
        self.end_token = any(part.end_token for part in parts)

    def width(self, hidden: int) -> int:
        return len(self._parts) * hidden

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.cat([part.pool(hidden, cu_seqlens) for part in self._parts], dim=1)

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        return torch.cat([part.pool_spans(hidden, spans) for part in self._parts], dim=1)

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        for part, columns in zip(self._parts, out.chunk(len(self._parts), dim=1), strict=True):
            picked = part.picked(row)
            if picked is None:
                part.pool_row(hidden, row, columns)
            else:
                columns.copy_(hidden.index_select(0, picked))


def _reduced(how: str, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(tokens, hidden) → (sequences, hidden)."""
    if len(cu_seqlens) == 2:  # a text alone, which waits for each step
        return tokens.mean(0, keepdim=True) if how == "mean" else tokens.amax(0, keepdim=True)
    return torch.segment_reduce(tokens, how, lengths=cu_seqlens.diff().long(), unsafe=True)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    """float32 (sequences, 1)."""
    return cu_seqlens.diff().unsqueeze(1).float()


_JOINT: Final = "+"
POOLINGS: Final[Mapping[str, Pooling]] = {
    pooling.name: pooling
    for pooling in (_FirstToken(), _Max(), _Mean(), _MeanSqrtLength(), _WeightedMean(), _LastToken())
}
"""Every pooling that embedq computes, by the names and in the order of sentence-transformers."""


def pooling_of(names: Sequence[str]) -> Pooling:
    """The pooling called `names[0]`; of several, all of them, their vectors one after the other.

    Raises:
        KeyError: there is no such pooling.
    """
    parts = [POOLINGS[name] for name in names]
    return parts[0] if len(parts) == 1 else _Concatenated(parts)
