"""DeBERTa-v2's forward (and v3's) over a packed row, written out in PyTorch.

Its attention adds what query and key say of each other's distance, so its scores are computed for all texts of one length at
a time, on CUDA, too. What depends on weights alone, such as the projected distances, is computed once.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.kernels.attention import LengthRun, Packing, rectangle
from embedq_consumer.engine.models.bert_cpu import BertLayer, bert_layer, pair
from embedq_consumer.engine.models.relative import log_buckets
from embedq_consumer.engine.models.traits import ForwardOptions
from embedq_consumer.engine.row import PooledForward

__all__ = ["PackedDeberta"]


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    base: BertLayer
    keys: Tensor | None
    """What content attends to of distances (c2p): (heads, distances, head_dim), scaled. None if it does not."""
    queries: Tensor | None
    """What distances attend to of content (p2c), likewise."""


class PackedDeberta:
    """The layers of one DebertaV2Model, on a CPU or on CUDA."""

    def __init__(self, model: Any, options: ForwardOptions) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._head_dim = int(config.hidden_size) // self._heads
        self._eps = float(config.layer_norm_eps)
        self._kinds = _kinds(config)
        self._scale = (self._head_dim * (1 + len(self._kinds))) ** -0.5
        self._most = options.limits.max_tokens
        embeddings = model.embeddings
        self._words = embeddings.word_embeddings.weight.detach()
        self._positions = embeddings.position_embeddings.weight.detach() if _has_positions(config) else None
        self._types = embeddings.token_type_embeddings.weight[0].detach() if config.type_vocab_size else None
        self._projection = (
            embeddings.embed_proj.weight.detach() if _embedding_size(config) != config.hidden_size else None
        )
        self._embedding_norm = pair(embeddings.LayerNorm)
        span, distances = self._distances(model.encoder, config)
        places = log_buckets(
            self._most,
            buckets=int(getattr(config, "position_buckets", -1)),
            max_distance=_max_distance(config),
        ).to(self._words.device)
        self._to_key = (places + span).clamp(0, 2 * span - 1)
        self._to_query = (span - places).clamp(0, 2 * span - 1)
        shared = bool(getattr(config, "share_att_key", False))
        self._layers = [self._layer(layer, distances, shared) for layer in model.encoder.layer]
        self.kernels = {"attention": "torch_sdpa"}

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` has relative attention, the usual activation, and no convolution."""
        config = model.config
        return bool(
            model.dtype in (torch.float32, torch.bfloat16)
            and config.hidden_act == "gelu"
            and config.relative_attention
            and not getattr(config, "conv_kernel_size", 0)
            and getattr(config, "attention_head_size", None) is None
        )

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (tokens, hidden) of int64 `ids` and `positions` (tokens,)."""
        x = F.embedding(ids, self._words)
        if self._positions is not None:
            x = x + F.embedding(positions, self._positions)
        if self._types is not None:
            x = x + self._types
        if self._projection is not None:
            x = F.linear(x, self._projection)
        x = self._normalized(x, self._embedding_norm)
        for layer in self._layers:
            base = layer.base
            q, k, v = F.linear(x, *base.qkv).view(-1, 3, self._heads, self._head_dim).unbind(1)
            attended = torch.empty_like(q)
            for run in packing.runs:
                rectangle(attended, run).copy_(self._attended(q, k, v, layer, run))
            x = self._normalized(F.linear(attended.flatten(1), *base.o_proj) + x, base.attention_norm)
            wide = F.gelu(F.linear(x, *base.up))
            x = self._normalized(F.linear(wide, *base.down) + x, base.norm)
        return x

    def pooled(self) -> PooledForward | None:
        """None: attention takes another call for each length."""
        return None

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, layer: _Layer, run: LengthRun) -> Tensor:
        """(texts, tokens, heads, head_dim) of the texts of one length."""
        q, k, v = (rectangle(t, run).transpose(1, 2) for t in (query, key, value))
        shape = (*q.shape[:3], run.length)
        bias: Tensor | None = None
        if layer.keys is not None:
            scores = q @ layer.keys.transpose(1, 2)
            bias = scores.gather(3, self._square(self._to_key, run.length).expand(shape))
        if layer.queries is not None:
            scores = k @ layer.queries.transpose(1, 2)
            of_keys = scores.gather(3, self._square(self._to_query, run.length).expand(shape)).transpose(2, 3)
            bias = of_keys.contiguous() if bias is None else bias + of_keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self._scale).transpose(1, 2)

    def _square(self, places: Tensor, length: int) -> Tensor:
        """(length, length): the entry of `places`, which has one for each distance, for row minus column."""
        own = places[self._most - length : self._most + length - 1]
        square: Tensor = own.unfold(0, length, 1).flip(1)
        return square

    def _distances(self, encoder: Any, config: Any) -> tuple[int, Tensor]:
        """How far embeddings of distances reach to either side, and the embeddings, (2 · span, hidden)."""
        span = int(getattr(config, "position_buckets", -1))
        if span <= 0:
            span = _max_distance(config)
        weights: Tensor = encoder.rel_embeddings.weight.detach()
        if "layer_norm" in str(getattr(config, "norm_rel_ebd", "none")).lower():
            weights = self._normalized(weights, pair(encoder.LayerNorm))
        return span, weights[: 2 * span]

    def _layer(self, layer: Any, distances: Tensor, shared: bool) -> _Layer:
        attention = layer.attention
        inner = attention.self

        def projected(name: str, own: str) -> Tensor:
            module = getattr(inner, name if shared else own)
            channels = F.linear(distances, *pair(module)) * self._scale
            heads: Tensor = channels.view(-1, self._heads, self._head_dim).transpose(0, 1)
            return heads

        return _Layer(
            base=bert_layer(
                (inner.query_proj, inner.key_proj, inner.value_proj),
                attention.output.dense,
                attention.output.LayerNorm,
                layer,
            ),
            keys=projected("key_proj", "pos_key_proj") if "c2p" in self._kinds else None,
            queries=projected("query_proj", "pos_query_proj") if "p2c" in self._kinds else None,
        )

    def _normalized(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self._eps)


def _kinds(config: Any) -> list[str]:
    """Which of c2p and p2c `config` asks for."""
    return [kind for kind in ("c2p", "p2c") if kind in (config.pos_att_type or ())]


def _max_distance(config: Any) -> int:
    most = int(getattr(config, "max_relative_positions", -1))
    return most if most > 0 else int(config.max_position_embeddings)


def _has_positions(config: Any) -> bool:
    return bool(getattr(config, "position_biased_input", True))


def _embedding_size(config: Any) -> int:
    return int(getattr(config, "embedding_size", config.hidden_size))
