"""The forward of BERT and its relatives (RoBERTa, XLM-R, CamemBERT) over a packed row on CUDA, written out: bf16 or FP8.

One product makes queries, keys and values; what lies between the products is one kernel each (kernels/bert_ops.py), and
the last norm and the pooling are float32. PackedEncoder proves it against transformers' own code at every load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.kernels.attention import Packing, cuda_kernel
from embedq_consumer.engine.kernels.bert_ops import Norm, add_layer_norm, bias_gelu, embed
from embedq_consumer.engine.kernels.block_attention import Bounds, block_attention, bounds_of, takes_head
from embedq_consumer.engine.kernels.fp8 import Weight, in_fp8, linear, select_rows, split_channels, weight_of
from embedq_consumer.engine.kernels.fused_ops import QuantizedRows, per_token_quant_fp8
from embedq_consumer.engine.models.traits import ForwardOptions
from embedq_consumer.engine.row import PooledForward, Row

__all__ = ["PackedBertCuda"]

_TANH = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""Activations, and whether they are the approximation with tanh."""

_BLOCK_TOKENS = 512
"""Where no text is longer, attention runs in tiles of the row (kernels/block_attention.py)."""
_FP8_PRODUCTS = frozenset({"down"})
"""The products that run in FP8. all-MiniLM-L6-v2's worst text of 1,000 keeps a cosine of 0.996 with these, 0.988 with all,
and 0.995 with the best two; rounding spreads evenly over its layers, so leaving some in bf16 helps little."""


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    qkv: Weight
    qkv_bias: Tensor
    o_proj: Weight
    o_proj_bias: Tensor
    attention_norm: Norm
    up: Weight
    up_bias: Tensor
    down: Weight
    down_bias: Tensor
    norm: Norm


class PackedBertCuda:
    """The layers of one model, which it takes apart as it fuses them: no weight is held twice.

    With `options.quantized`, only the products in `_FP8_PRODUCTS` run in FP8. `attention`, if given, takes the place of the
    kernel that is fastest here. Slots of a row without a text get finite vectors that mean nothing.
    """

    def __init__(
        self,
        model: Any,
        options: ForwardOptions,
        *,
        attention: Callable[..., Tensor] | None = None,
    ) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._head_dim = int(config.hidden_size) // self._heads
        self._eps = float(config.layer_norm_eps)
        self._tanh = _TANH[config.hidden_act]
        self._pooling = options.pooling
        self._max_tokens = options.limits.max_tokens
        embeddings = model.embeddings
        self._words: Tensor = embeddings.word_embeddings.weight.detach()
        # Every text is one segment, so the first token type is added everywhere.
        types = embeddings.token_type_embeddings.weight[0].float()
        self._positions: Tensor = (embeddings.position_embeddings.weight.float() + types).detach()
        self._padding = options.limits.padding
        self._row_positions = self._positions[options.limits.row_offset :]
        self._embedding_norm = _pair(embeddings.LayerNorm)
        self.device = self._words.device
        self.hidden_size = int(config.hidden_size)
        self._layers = [
            _layer(layer, options.quantized and index not in options.keep_bf16)
            for index, layer in enumerate(model.encoder.layer)
        ]
        self._in_blocks = (
            attention is None
            and options.limits.max_tokens <= _BLOCK_TOKENS
            and not options.deterministic
            and takes_head(self._head_dim)
        )
        self.attention: Callable[..., Tensor]
        if self._in_blocks:
            self.attention = block_attention
        else:
            self.attention = attention or cuda_kernel(
                self._heads, self._heads, self._head_dim, False, self._words.dtype, self.device
            )
        self.kernels = {"attention": self.attention.__name__}

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model`, of this family on CUDA, is a plain encoder in bf16 with an activation known here."""
        config = model.config
        return bool(
            model.dtype == torch.bfloat16
            and config.hidden_act in _TANH
            and not config.is_decoder
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and config.hidden_size % 16 == 0
            and config.intermediate_size % 16 == 0
        )

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states, float32 (tokens, hidden). `positions` are the model's own."""
        x = self._embedded(ids, positions, self._positions)
        return self._run(*x, packing.cu_seqlens, packing.longest, None)

    def pooled(self) -> PooledForward:
        """Up to the pooled vector, with positions that start at `limits.row_offset` of the model's."""
        return PooledForward(
            run=self._pool,
            hidden_size=self._pooling.width(self.hidden_size),
            device=self.device,
            attention=self.attention,
            longest=self._max_tokens,
            padding=self._padding,
        )

    def _pool(self, row: Row, longest: int, out: Tensor) -> None:
        """Of the last layer, pooled tokens alone get more than keys and values. Nothing here waits for the device
        or depends on what the tensors hold, so it can be captured as a CUDA graph."""
        x = self._embedded(row.ids, row.positions, self._row_positions)
        longest = min(longest, self._max_tokens)
        picked = self._pooling.picked(row)
        if picked is None:
            self._pooling.pool_row(self._run(*x, row.cu_seqlens, longest, None), row, out)
        else:
            self._run(*x, row.cu_seqlens, longest, picked, out)

    def _embedded(self, ids: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, QuantizedRows | None]:
        quantized = in_fp8(self._layers[0].qkv)
        return embed(ids, positions, self._words, table, self._embedding_norm, self._eps, quantized=quantized)

    def _run(
        self,
        x: Tensor,
        scaled: QuantizedRows | None,
        cu_seqlens: Tensor,
        longest: int,
        picked: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of all tokens, or of the one `picked` for each slot: float32, in `out` if given."""
        bounds = bounds_of(cu_seqlens, len(x)) if self._in_blocks else None
        for index, layer in enumerate(self._layers):
            last = index == len(self._layers) - 1
            rows = x if scaled is None else scaled
            if last and picked is not None:
                x = x.index_select(0, picked)
                attended = self._attended_by(picked, rows, layer, cu_seqlens, longest)
            else:
                qkv = linear(rows, layer.qkv, layer.qkv_bias)
                q, k, v = qkv.view(-1, 3, self._heads, self._head_dim).unbind(1)
                attended = self._attended(q, k, v, cu_seqlens, longest, bounds)
            attended = attended.reshape(len(x), self.hidden_size)
            y = linear(per_token_quant_fp8(attended) if in_fp8(layer.o_proj) else attended, layer.o_proj)
            x, scaled = add_layer_norm(
                x, y, layer.o_proj_bias, layer.attention_norm, self._eps, quantized=in_fp8(layer.up)
            )
            wide = linear(x if scaled is None else scaled, layer.up)
            active = bias_gelu(wide, layer.up_bias, tanh=self._tanh, quantized=in_fp8(layer.down))
            y = linear(active, layer.down)
            if not last:
                x, scaled = add_layer_norm(
                    x,
                    y,
                    layer.down_bias,
                    layer.norm,
                    self._eps,
                    quantized=in_fp8(self._layers[index + 1].qkv),
                )
        if out is None:
            out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        add_layer_norm(x, y, layer.down_bias, layer.norm, self._eps, out=out)
        return out

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, bounds: Bounds | None
    ) -> Tensor:
        scale = self._head_dim**-0.5
        if bounds is None:
            return self.attention(q, k, v, cu_seqlens, longest, scale)
        return block_attention(q, k, v, bounds, scale)

    def _attended_by(
        self, picked: Tensor, rows: Tensor | QuantizedRows, layer: _Layer, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        """Attention of one token of each slot: keys and values of all tokens, queries of those."""
        of_queries, of_keys = split_channels(layer.qkv, self.hidden_size)
        q_bias, kv_bias = layer.qkv_bias[: self.hidden_size], layer.qkv_bias[self.hidden_size :]
        q = linear(select_rows(rows, picked), of_queries, q_bias).view(-1, self._heads, self._head_dim)
        k, v = linear(rows, of_keys, kv_bias).view(-1, 2, self._heads, self._head_dim).unbind(1)
        if self._in_blocks:
            return block_attention(
                q, k, v, (cu_seqlens[:-1], cu_seqlens[1:]), self._head_dim**-0.5, sparse=True
            )
        # Slots without a text have no query either: attention over no keys at all is undefined.
        cu_seqlens_q = F.pad((cu_seqlens[1:] > cu_seqlens[:-1]).cumsum(0, dtype=torch.int32), (1, 0))
        return self.attention(q, k, v, cu_seqlens, longest, self._head_dim**-0.5, cu_seqlens_q)


def _layer(layer: Any, quantized: bool) -> _Layer:
    attention, up, down = layer.attention, layer.intermediate.dense, layer.output.dense
    parts = (attention.self.query, attention.self.key, attention.self.value)

    def fused(name: str, *modules: Any) -> Weight:
        in_fp8 = quantized and name in _FP8_PRODUCTS
        weight = weight_of([module.weight.detach() for module in modules], quantized=in_fp8)
        for module in modules:
            module.weight = None  # the model's own copy goes, layer by layer
        return weight

    return _Layer(
        qkv=fused("qkv", *parts),
        qkv_bias=torch.cat([part.bias.detach() for part in parts]),
        o_proj=fused("o_proj", attention.output.dense),
        o_proj_bias=attention.output.dense.bias.detach(),
        attention_norm=_pair(attention.output.LayerNorm),
        up=fused("up", up),
        up_bias=up.bias.detach(),
        down=fused("down", down),
        down_bias=down.bias.detach(),
        norm=_pair(layer.output.LayerNorm),
    )


def _pair(module: Any) -> Norm:
    return module.weight.detach(), module.bias.detach()
