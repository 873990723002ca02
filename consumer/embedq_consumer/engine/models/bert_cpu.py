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

from embedq_consumer.engine.kernels.attention import Packing, attend_runs
from embedq_consumer.engine.models.traits import ForwardOptions
from embedq_consumer.engine.row import PooledForward

__all__ = ["PackedBert"]


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    qkv: tuple[Tensor, Tensor]
    o_proj: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


class _Workspace(msgspec.Struct, frozen=True, kw_only=True):
    """Scratch tensors that every layer of every batch reuses.

    Fresh tensors of several megabytes are paged in by the kernel, which costs more than what is computed in them.
    """

    qkv: Tensor
    attended: Tensor
    narrow: Tensor
    wide: Tensor


class PackedBert:
    """The layers of one BertModel, whose parameters it shares, except for the fused ones."""

    def __init__(self, model: Any, options: ForwardOptions) -> None:
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
        self._scratch: _Workspace | None = None
        self._layers = [_layer(layer) for layer in model.encoder.layer]
        self.kernels = {"attention": "torch_sdpa"}

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model`, a BERT on the CPU, is a plain encoder in float32 with the usual activation."""
        return bool(
            model.dtype == torch.float32
            and model.config.hidden_act == "gelu"
            and not model.config.is_decoder
            and getattr(model.config, "position_embedding_type", "absolute") == "absolute"
        )

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (tokens, hidden) of int64 `ids` and `positions` (tokens,)."""
        x = F.embedding(ids, self._words).add_(F.embedding(positions, self._positions))
        x = self._normalized(x, self._embedding_norm)
        scratch = self._workspace(len(ids))
        scale = self._head_dim**-0.5
        for layer in self._layers:
            q, k, v = _linear(x, layer.qkv, scratch.qkv).view(-1, 3, self._heads, self._head_dim).unbind(1)
            attend_runs(q, k, v, scratch.attended, packing.runs, causal=False, scale=scale)
            attended = scratch.attended.flatten(1)
            x = self._normalized(
                _linear(attended, layer.o_proj, scratch.narrow).add_(x), layer.attention_norm
            )
            wide = torch.ops.aten.gelu_(_linear(x, layer.up, scratch.wide))
            x = self._normalized(_linear(wide, layer.down, scratch.narrow).add_(x), layer.norm)
        return x

    def pooled(self) -> PooledForward | None:
        """None: there are no CUDA graphs on a CPU."""
        return None

    def _workspace(self, tokens: int) -> _Workspace:
        """The first `tokens` rows of the scratch tensors, which grow when they must."""
        if self._scratch is None or self._scratch.narrow.shape[0] < tokens:
            hidden, heads, dim = self._heads * self._head_dim, self._heads, self._head_dim
            wide = self._layers[0].up[1].shape[0]
            self._scratch = _Workspace(
                qkv=torch.empty(tokens, 3 * hidden),
                attended=torch.empty(tokens, heads, dim),
                narrow=torch.empty(tokens, hidden),
                wide=torch.empty(tokens, wide),
            )
        scratch = self._scratch
        return _Workspace(
            qkv=scratch.qkv[:tokens],
            attended=scratch.attended[:tokens],
            narrow=scratch.narrow[:tokens],
            wide=scratch.wide[:tokens],
        )

    def _normalized(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self._eps)


def _linear(x: Tensor, layer: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    weight, bias = layer
    return torch.addmm(bias, x, weight.t(), out=out)


def _layer(layer: Any) -> _Layer:
    attention = layer.attention
    parts = [_pair(part) for part in (attention.self.query, attention.self.key, attention.self.value)]
    return _Layer(
        qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
        o_proj=_pair(attention.output.dense),
        attention_norm=_pair(attention.output.LayerNorm),
        up=_pair(layer.intermediate.dense),
        down=_pair(layer.output.dense),
        norm=_pair(layer.output.LayerNorm),
    )


def _pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()
