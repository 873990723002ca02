"""BERT's forward over a packed row, written out in PyTorch: what MiniLM and its family run on a CPU.

It computes what transformers' BertModel computes, with one product for query, key and value, sums taken in place, and
position and token-type tables added up once. PackedEncoder proves it against BertModel at every load. A row of few tokens is
run by ONNX Runtime where that is installed (`kernels/onnx_rows.py`), else multiplied with weights that were laid out for the
processor once; in bf16 every row is (`kernels/cpu_products.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.kernels.attention import SPARE_ROWS, Packing, attend_runs
from embedq_consumer.engine.kernels.cpu_products import (
    FEW_TOKENS,
    FEW_TOKENS_BESIDE_BF16,
    Bf16Products,
    PackedProducts,
    PlainProducts,
    Products,
    copyable,
    fast_bf16,
    packable,
    packed,
    rounded,
)
from embedq_consumer.engine.kernels.onnx_rows import Embeddings, OnnxBert
from embedq_consumer.engine.models.traits import ForwardOptions
from embedq_consumer.engine.row import PooledForward
from embedq_consumer.engine.safety.panics import first_line

__all__ = ["BertLayer", "PackedBert", "bert_layer", "pair"]


_Pair = tuple[Tensor, Tensor]
"""A product's weight and bias."""


class BertLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's weights and biases, those of query, key and value side by side."""

    qkv: tuple[Tensor, Tensor]
    o_proj: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


class _Workspace(msgspec.Struct, frozen=True, kw_only=True):
    """Scratch tensors that every layer of every batch reuses; `qkv` has `SPARE_ROWS` more rows than the others.

    Fresh tensors of several megabytes are paged in by the kernel, which costs more than what is computed in them.
    """

    qkv: Tensor
    attended: Tensor
    narrow: Tensor
    wide: Tensor


class PackedBert:
    """The layers of one BertModel, whose parameters it shares, except for the fused ones.

    A family that differs from BERT in names, or in what is added to attention's scores, overrides `_position_table`, `_layer`
    and `_bias`.
    """

    def __init__(self, model: Any, options: ForwardOptions) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._head_dim = int(config.hidden_size) // self._heads
        self._eps = float(config.layer_norm_eps)
        embeddings = model.embeddings
        self._embeddings = Embeddings(
            words=embeddings.word_embeddings.weight.detach(),
            positions=self._position_table(embeddings).detach(),
            norm=pair(embeddings.LayerNorm),
        )
        # Its `scratch` is a _Workspace: rows may run at once, each in a thread of its own.
        self._local = threading.local()
        self._layers = [self._layer(layer) for layer in model.encoder.layer]
        self._products: Products = PlainProducts()
        self._few: tuple[Sequence[BertLayer], Products] | None = None
        self.kernels = {"attention": "torch_sdpa"}
        onnx = _onnx(self._embeddings, self._layers, self._heads, self._eps)
        self._onnx = onnx if isinstance(onnx, OnnxBert) else None
        if isinstance(onnx, str):
            self.kernels["not_onnxruntime"] = onnx
        self._onnx_tokens = FEW_TOKENS
        if options.bf16:
            self._round(model)
        else:
            self._copy_for_few_tokens()

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
        bias = self._bias(packing)
        if self._onnx is not None and len(ids) <= self._onnx_tokens:
            return self._onnx(ids, positions, packing.runs, bias)
        tables = self._embeddings
        x = F.embedding(ids, tables.words).add_(F.embedding(positions, tables.positions))
        x = self._normalized(x, tables.norm)
        scratch = self._workspace(len(ids))
        scale = self._head_dim**-0.5
        few = self._few if len(ids) <= FEW_TOKENS else None
        layers, products = few or (self._layers, self._products)
        rows = scratch.qkv[: len(ids)]
        scratch.qkv[len(ids) :] = 0
        q, k, v = scratch.qkv.view(-1, 3, self._heads, self._head_dim).unbind(1)
        q = q[: len(ids)]
        for layer in layers:
            products.linear(x, layer.qkv, rows)
            attend_runs(q, k, v, scratch.attended, packing.runs, causal=False, scale=scale, bias=bias)
            attended = scratch.attended.flatten(1)
            x = self._normalized(
                products.added(attended, layer.o_proj, x, scratch.narrow), layer.attention_norm
            )
            x = self._normalized(
                products.feed_forward(x, layer.up, layer.down, scratch.wide, scratch.narrow), layer.norm
            )
        return x

    def pooled(self) -> PooledForward | None:
        """None: there are no CUDA graphs on a CPU."""
        return None

    def _copy_for_few_tokens(self) -> None:
        """Make the copies of the layers that rows of few tokens run with, where there may be any and nothing else runs them."""
        if self._onnx is None and packable(_weights(self._layers)):
            self._few = [_each_product(layer, _packed) for layer in self._layers], PackedProducts()
        self.kernels["few_rows"] = "onnxruntime" if self._onnx else "packed" if self._few else "plain"

    def _round(self, model: Any) -> None:
        """Multiply in bf16, and give up the weights in float32, layer by layer."""
        packs = fast_bf16(self._layers[0].up[0])
        for number, layer in enumerate(model.encoder.layer):
            self._layers[number] = _each_product(
                self._layers[number], lambda pair: rounded(pair, packs=packs)
            )
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.new_empty(0)
        self._products = Bf16Products(packs=packs)
        self.kernels["products"] = "bf16_packed" if packs else "bf16_plain"
        if self._onnx is not None:
            self.kernels["few_rows"] = "onnxruntime"
            self._onnx_tokens = min(FEW_TOKENS, FEW_TOKENS_BESIDE_BF16 * torch.get_num_threads())

    @staticmethod
    def _position_table(embeddings: Any) -> Tensor:
        """What each position adds to a token, (positions, hidden)."""
        # Every text is one segment, so the first token type is added everywhere.
        types = embeddings.token_type_embeddings.weight[0]
        table: Tensor = types + embeddings.position_embeddings.weight
        return table

    @staticmethod
    def _layer(layer: Any) -> BertLayer:
        """The weights of one of the model's layers."""
        attention = layer.attention
        inner = attention.self
        return bert_layer(
            (inner.query, inner.key, inner.value), attention.output.dense, attention.output.LayerNorm, layer
        )

    def _bias(self, packing: Packing) -> Callable[[int], Tensor] | None:
        """What is added to attention's scores, as in `attend_runs`."""
        return None

    def _workspace(self, tokens: int) -> _Workspace:
        """The first `tokens` rows of this thread's scratch tensors, which grow when they must."""
        scratch: _Workspace | None = getattr(self._local, "scratch", None)
        if scratch is None or scratch.narrow.shape[0] < tokens:
            hidden, heads, dim = self._heads * self._head_dim, self._heads, self._head_dim
            wide = self._layers[0].up[1].shape[0]
            like = self._layers[0].up[1]
            scratch = self._local.scratch = _Workspace(
                qkv=like.new_empty(tokens + SPARE_ROWS, 3 * hidden),
                attended=like.new_empty(tokens, heads, dim),
                narrow=like.new_empty(tokens, hidden),
                wide=like.new_empty(tokens, wide),
            )
        return _Workspace(
            qkv=scratch.qkv[: tokens + SPARE_ROWS],
            attended=scratch.attended[:tokens],
            narrow=scratch.narrow[:tokens],
            wide=scratch.wide[:tokens],
        )

    def _normalized(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, self._eps)


def _onnx(
    embeddings: Embeddings, layers: Sequence[BertLayer], heads: int, eps: float
) -> OnnxBert | str | None:
    """The same in ONNX Runtime; None where it is not installed, or of no use, or why it cannot run them."""
    if not copyable(_weights(layers)):
        return None
    try:
        return OnnxBert(embeddings, layers, heads, eps)
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001  each of its versions has its own kinds
        return f"{type(error).__name__}: {first_line(error)}"


def _packed(layer: _Pair) -> _Pair:
    weight, bias = layer
    return packed(weight), bias


def _each_product(layer: BertLayer, made: Callable[[_Pair], _Pair]) -> BertLayer:
    """The layer with what `made` makes of each product's weight and bias."""
    return msgspec.structs.replace(
        layer, qkv=made(layer.qkv), o_proj=made(layer.o_proj), up=made(layer.up), down=made(layer.down)
    )


def _weights(layers: Sequence[BertLayer]) -> list[Tensor]:
    """Those of all products."""
    return [each[0] for layer in layers for each in (layer.qkv, layer.o_proj, layer.up, layer.down)]


def bert_layer(queries_keys_values: Sequence[Any], o_proj: Any, attention_norm: Any, layer: Any) -> BertLayer:
    """The layer of these modules, and of `layer`'s own feed-forward ones."""
    parts = [pair(part) for part in queries_keys_values]
    return BertLayer(
        qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
        o_proj=pair(o_proj),
        attention_norm=pair(attention_norm),
        up=pair(layer.intermediate.dense),
        down=pair(layer.output.dense),
        norm=pair(layer.output.LayerNorm),
    )


def pair(module: Any) -> tuple[Tensor, Tensor]:
    """A module's weight and bias."""
    return module.weight.detach(), module.bias.detach()
