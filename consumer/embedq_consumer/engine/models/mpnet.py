"""MPNet's forward over a packed row, written out in PyTorch: BERT's, with a bias for the distance of two tokens.

There is no kernel of its own: on CUDA, too, each length of text is one call of PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.models.bert_cpu import BertLayer, PackedBert, bert_layer
from embedq_consumer.engine.models.relative import t5_buckets
from embedq_consumer.engine.models.traits import ForwardOptions

__all__ = ["PackedMPNet"]

_BUCKETS: Final = 32
"""transformers takes this many, whatever the configuration says."""
_MAX_DISTANCE: Final = 128


class PackedMPNet(PackedBert):
    """The layers of one MPNetModel, on a CPU or on CUDA."""

    def __init__(self, model: Any, options: ForwardOptions) -> None:
        super().__init__(model, options)
        self._most = options.limits.max_tokens
        weights: Tensor = model.encoder.relative_attention_bias.weight.detach()
        buckets = t5_buckets(self._most, buckets=_BUCKETS, max_distance=_MAX_DISTANCE)
        self._biases = F.embedding(buckets.to(weights.device), weights).t().contiguous()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` has the usual activation, and weights for all buckets."""
        return bool(
            model.dtype in (torch.float32, torch.bfloat16)
            and model.config.hidden_act == "gelu"
            and model.config.relative_attention_num_buckets >= _BUCKETS
        )

    @staticmethod
    def _position_table(embeddings: Any) -> Tensor:
        table: Tensor = embeddings.position_embeddings.weight
        return table

    @staticmethod
    def _layer(layer: Any) -> BertLayer:
        inner = layer.attention.attn
        return bert_layer((inner.q, inner.k, inner.v), inner.o, layer.attention.LayerNorm, layer)

    def _bias(self, packing: Packing) -> Callable[[int], Tensor]:
        @cache
        def bias(length: int) -> Tensor:
            """(heads, length, length) of the bias for each distance."""
            own = self._biases[:, self._most - length : self._most + length - 1]
            # Row i of the matrix begins i places to the left.
            return own.unfold(1, length, 1).flip(1).contiguous()

        return bias
