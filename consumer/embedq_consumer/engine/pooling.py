"""How a text's hidden states become its vector: one class for each pooling, and `POOLINGS` by name.

A new pooling is a class here. All else that depends on the pooling asks it: which token ends a span, whether spans have
vectors at all, and what runs on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.row import Row

__all__ = ["POOLINGS", "Pooling"]

Spans = npt.NDArray[np.int64]
"""(spans, 2): ranges `[begin, end)` of a row's tokens."""


class Pooling(ABC):
    """One way to pool. Vectors are float32, whatever the hidden states are."""

    name: ClassVar[str]
    """As in a model's `1_Pooling/config.json`, and as it counts for the model version."""
    needs_last_norm: ClassVar[bool] = False
    """Whether the model's last norm may run on the pooled tokens alone, in float32, since all others are dropped."""
    supports_spans: ClassVar[bool] = True
    """Whether a span in the middle of a text can have a vector."""
    end_token: ClassVar[bool] = False
    """Whether the last span of a window includes the special tokens after the text."""

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

        Needed where `picked` gives None.
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
        return torch.segment_reduce(hidden.float(), "mean", lengths=cu_seqlens.diff().long(), unsafe=True)

    def pool_spans(self, hidden: Tensor, spans: Spans) -> Tensor:
        inside = np.concatenate([np.arange(begin, end) for begin, end in spans])
        tokens = hidden[torch.from_numpy(inside).to(hidden.device)].float()
        lengths = torch.from_numpy(spans[:, 1] - spans[:, 0]).to(hidden.device)
        return torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)

    def pool_row(self, hidden: Tensor, row: Row, out: Tensor) -> None:
        from embedq_consumer.engine.kernels.bert_ops import mean_of_slots  # Triton, which a CPU may lack

        mean_of_slots(hidden, row.cu_seqlens, out)


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


POOLINGS: Final[Mapping[str, Pooling]] = {
    pooling.name: pooling for pooling in (_FirstToken(), _Mean(), _LastToken())
}
"""Every pooling that embedq computes."""
