"""BERT's forward over a packed row, written out: what MiniLM and its family run on a CPU.

It computes what transformers' BertModel computes, with one product for query, key and value, sums taken in place, and
position and token-type tables added up once. PackedEncoder proves it against BertModel at every load.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.attention import Packing, attend_runs

__all__ = ["PackedBert"]


class _Layer(msgspec.Struct, frozen=True):
    qkv: tuple[Tensor, Tensor]
    attended: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


class PackedBert:
    """The layers of one BertModel; shares its parameters but for the fused ones."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._head_dim = int(config.hidden_size) // self._heads
        self._eps = float(config.layer_norm_eps)
        embeddings = model.embeddings
        self._words = embeddings.word_embeddings.weight.detach()
        # Every text is one segment, so the first token type is added everywhere.
        types = embeddings.token_type_embeddings.weight[0]
        self._positions = (embeddings.position_embeddings.weight + types).detach()
        self._embedding_norm = _pair(embeddings.LayerNorm)
        self._layers = [_layer(layer) for layer in model.encoder.layer]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is a plain encoder BERT in float32 on the CPU with the usual activation."""
        return (
            type(model).__name__ == "BertModel"
            and model.device.type == "cpu"
            and model.dtype == torch.float32
            and model.config.hidden_act == "gelu"
            and not model.config.is_decoder
            and getattr(model.config, "position_embedding_type", "absolute") == "absolute"
        )

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (tokens, hidden) of int64 `ids` and `positions` (tokens,)."""
        x = F.embedding(ids, self._words).add_(F.embedding(positions, self._positions))
        x = self._normalised(x, self._embedding_norm)
        attended = torch.empty(x.shape[0], self._heads, self._head_dim)
        scale = self._head_dim**-0.5
        for layer in self._layers:
            q, k, v = F.linear(x, *layer.qkv).unflatten(1, (3, self._heads, self._head_dim)).unbind(1)
            attend_runs(q, k, v, attended, packing.runs, causal=False, scale=scale)
            x = self._normalised(F.linear(attended.flatten(1), *layer.attended).add_(x), layer.attention_norm)
            x = self._normalised(F.linear(F.gelu(F.linear(x, *layer.up)), *layer.down).add_(x), layer.norm)
        return x

    def _normalised(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self._eps)


def _layer(layer: Any) -> _Layer:
    attention = layer.attention
    parts = [_pair(part) for part in (attention.self.query, attention.self.key, attention.self.value)]
    return _Layer(
        qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
        attended=_pair(attention.output.dense),
        attention_norm=_pair(attention.output.LayerNorm),
        up=_pair(layer.intermediate.dense),
        down=_pair(layer.output.dense),
        norm=_pair(layer.output.LayerNorm),
    )


def _pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()
