"""Qwen3's forward over a packed row, written out for CUDA: what Qwen3-Embedding runs on a GPU.

It computes what transformers' Qwen3Model computes, with one product for query, key and value and one for gate and up, and
one kernel for each of what lies between (kernels/fused_ops.py). PackedEncoder proves it against Qwen3Model at every load.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.kernels.attention import Packing, cuda_kernel
from embedq_consumer.engine.kernels.fp8 import Weight, in_fp8, linear, select_rows, split_channels, weight_of
from embedq_consumer.engine.kernels.fused_ops import (
    QuantizedRows,
    copy_rows,
    fused_add_rms_norm,
    per_token_quant_fp8,
    qk_norm_rope,
    silu_and_mul,
)
from embedq_consumer.engine.kernels.gated_gemm import fuses, gated_linear, interleaved, obstacle
from embedq_consumer.engine.kernels.skinny_gemm import (
    ATTENTION_ROWS,
    skinny_attention,
    skinny_linear,
    skinny_plan,
)
from embedq_consumer.engine.models.rotary import FIXED
from embedq_consumer.engine.models.traits import ForwardOptions
from embedq_consumer.engine.row import PooledForward, Row, Shared

__all__ = ["PackedQwen3"]


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    norm: Tensor
    qkv: Weight
    qk_norm: tuple[Tensor, Tensor]
    """The weights of the norms of queries and keys."""
    o_proj: Weight
    middle_norm: Tensor
    gate_up: Weight
    down: Weight


class PackedQwen3:
    """The layers of one Qwen3Model, which it takes apart as it fuses them: no weight is held twice.

    With `options.quantized` every product runs in FP8; embeddings, norms, attention and residuals stay as they are.
    """

    def __init__(self, model: Any, options: ForwardOptions) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._head_dim = int(config.head_dim)
        self._eps = float(config.rms_norm_eps)
        self._words: Tensor = model.embed_tokens.weight.detach()
        self.device = self._words.device
        self.hidden_size = int(config.hidden_size)
        self._last_norm = options.last_norm
        self._norm: Tensor | None = None
        if not isinstance(model.norm, torch.nn.Identity):
            self._norm = model.norm.weight.detach()
        self._rotation = _rotation(model)
        # Gate and up are then interleaved in every layer, whichever product takes them.
        missing = (
            "fp8"
            if options.quantized
            else obstacle(int(config.intermediate_size), self.hidden_size, self.device)
        )
        self._fused_epilogue = missing is None
        self._layers = [
            _layer(
                layer,
                options.quantized and index not in options.keep_bf16,
                mixed=self._fused_epilogue,
            )
            for index, layer in enumerate(model.layers)
        ]
        self.causal = bool(getattr(config, "is_causal", True))
        self.attention = cuda_kernel(
            self._heads, self._kv_heads, self._head_dim, self.causal, self._words.dtype, self.device
        )
        self.kernels = {
            "attention": self.attention.__name__,
            "gate": "fused_epilogue" if missing is None else f"separate: {missing}",
        }

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model`, a Qwen3 on CUDA, is a plain one in bf16: full attention, and rotary positions that are the same for
        every text, whatever its length: so that a prefix may be shared."""
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        rotary = model.rotary_emb
        half = int(config.head_dim) // 2
        return bool(
            model.dtype == torch.bfloat16
            and config.hidden_act == "silu"
            and not config.attention_bias
            and kinds == {"full_attention"}
            and getattr(rotary, "rope_type", None) in FIXED
            and len(rotary.inv_freq) == half
            and half & (half - 1) == 0
        )

    def __call__(self, ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Last hidden states (tokens, hidden), as the model's own forward gives them."""
        x, y = self._run(ids, positions, packing.cu_seqlens, packing.longest)
        if self._norm is None:
            return x if y is None else x + y
        normed = fused_add_rms_norm(x, y, self._norm, self._eps)
        assert isinstance(normed, Tensor)
        return normed

    def pooled(self) -> PooledForward | None:
        """Up to the last norm of each text's last token; None where all tokens get it, or there is none."""
        if self._last_norm is None:
            return None
        return PooledForward(
            run=self._pool,
            hidden_size=self.hidden_size,
            device=self.device,
            attention=self.attention,
            prefix_pool=self.prefix_pool if self.causal else None,
        )

    def _pool(self, row: Row, longest: int, out: Tensor) -> None:
        """Write the last norm, in float32, of the tokens at `row.last` to `out` (slots, hidden).

        Of the last layer, those tokens alone get more than keys and values. Nothing here waits for the device
        or depends on what the tensors hold, so it can be captured as a CUDA graph. Tokens after `row.cu_seqlens[-1]` belong
        to no sequence: they cost time and change nothing.
        """
        if self._last_norm is None:
            raise RuntimeError("a pooled forward without a last norm. This is a bug.")
        x, y = self._run(row.ids, row.positions, row.cu_seqlens, longest, row.last, row.shared)
        fused_add_rms_norm(x, y, self._last_norm, self._eps, store_sum=False, out=out)

    def prefix_pool(self, rows: int) -> Tensor:
        """A pool for the keys and values of `rows` tokens: (layers, rows, 2 · kv_heads · head_dim), zeros."""
        width = 2 * self._kv_heads * self._head_dim
        return torch.zeros(len(self._layers), rows, width, dtype=self._words.dtype, device=self.device)

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        last: Tensor | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the last layer, in two terms that are still to be added."""
        x = F.embedding(ids, self._words)
        y: Tensor | None = None
        heads, kv_heads, dim = self._heads, self._kv_heads, self._head_dim
        for index, layer in enumerate(self._layers):
            rows = self._normed(x, y, layer.norm, layer.qkv)
            if last is not None and index == len(self._layers) - 1:
                x = x.index_select(0, last)
                attended = self._attended_by_last(index, rows, positions, cu_seqlens, longest, last, shared)
            else:
                qkv = self._product(rows, layer.qkv)
                rotated = (positions, self._rotation, layer.qk_norm, (heads, kv_heads), self._eps)
                if shared is None and len(qkv) in ATTENTION_ROWS:
                    attended = skinny_attention(qkv, *rotated, causal=self.causal)
                else:
                    qk_norm_rope(qkv, *rotated)
                    q, kv = torch.split(qkv, [heads * dim, 2 * kv_heads * dim], dim=1)
                    attended = self._attended(index, q, kv, cu_seqlens, longest, shared)
            rows = per_token_quant_fp8(attended) if in_fp8(layer.o_proj) else attended
            x, y = self._added(x, rows, layer.o_proj, in_product=False)
            gated = self._gated(self._normed(x, y, layer.middle_norm, layer.gate_up), layer.gate_up)
            x, y = self._added(x, gated, layer.down, in_product=True)
        return x, y

    def _attended(
        self,
        index: int,
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        shared: Shared | None,
        cu_seqlens_q: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries (tokens, heads · head_dim) over `kv`, keys and values side by side, and those of prefixes.

        `cu_seqlens_q`, if not None: only each text's last token has a query.
        """
        most = 1
        if shared is not None:
            keys = kv.new_empty(len(shared.copies), kv.shape[1])
            copy_rows(kv, shared.pool[index], keys, shared.copies, shared.count)
            if cu_seqlens_q is None:
                cu_seqlens_q, most = cu_seqlens, longest
            kv, cu_seqlens, longest = keys, shared.cu_seqlens, shared.longest
        kv_heads, dim = self._kv_heads, self._head_dim
        k, v = torch.split(kv.view(-1, 2 * kv_heads, dim), [kv_heads, kv_heads], dim=1)
        q = q.view(-1, self._heads, dim)
        return self.attention(q, k, v, cu_seqlens, longest, dim**-0.5, cu_seqlens_q, most).view(
            -1, self._heads * dim
        )

    def _attended_by_last(
        self,
        index: int,
        rows: Tensor | QuantizedRows,
        positions: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        last: Tensor,
        shared: Shared | None,
    ) -> Tensor:
        """Attention of last tokens alone: keys and values of all, queries of those (slots, heads · head_dim)."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._head_dim
        layer = self._layers[index]
        of_queries, of_keys = split_channels(layer.qkv, heads * dim)
        q = self._product(select_rows(rows, last), of_queries)
        kv = self._product(rows, of_keys)
        qk_norm_rope(q, positions.index_select(0, last), self._rotation, layer.qk_norm, (heads, 0), self._eps)
        qk_norm_rope(kv, positions, self._rotation, layer.qk_norm, (0, kv_heads), self._eps)
        # Slots without a sequence have no query either: attention over no keys at all is undefined.
        cu_seqlens_q = F.pad((cu_seqlens[1:] > cu_seqlens[:-1]).cumsum(0, dtype=torch.int32), (1, 0))
        return self._attended(index, q, kv, cu_seqlens, longest, shared, cu_seqlens_q)

    def _normed(self, x: Tensor, y: Tensor | None, norm: Tensor, weight: Weight) -> Tensor | QuantizedRows:
        """Rows for the product with `weight`."""
        return fused_add_rms_norm(x, y, norm, self._eps, quantized=in_fp8(weight))

    def _product(self, rows: Tensor | QuantizedRows, weight: Weight) -> Tensor:
        plan = self._plan(rows, weight)
        return linear(rows, weight) if plan is None else skinny_linear(rows, weight, plan)

    def _gated(self, rows: Tensor | QuantizedRows, weight: Weight) -> Tensor | QuantizedRows:
        plan = self._plan(rows, weight, gated=True)
        mixed = self._fused_epilogue
        if plan is None:
            if mixed and isinstance(rows, Tensor) and isinstance(weight, Tensor) and fuses(len(rows)):
                return gated_linear(rows, weight)
            return silu_and_mul(linear(rows, weight), quantized=in_fp8(weight), interleaved=mixed)
        gated = skinny_linear(rows, weight, plan, gated=True, interleaved=mixed)
        return per_token_quant_fp8(gated) if in_fp8(weight) else gated

    def _added(
        self, x: Tensor, rows: Tensor | QuantizedRows, weight: Weight, *, in_product: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`x` with the product added; or the two apart, where it is cheaper to let the next norm add them.

        A bf16 product adds at no cost where its inner dimension is long (`in_product`), which hides its epilogue.
        """
        plan = self._plan(rows, weight)
        if plan is not None:
            return skinny_linear(rows, weight, plan, residual=x), None
        if in_product and isinstance(rows, Tensor) and isinstance(weight, Tensor):
            return x.addmm_(rows, weight.t()), None
        return x, linear(rows, weight)

    def _plan(
        self, rows: Tensor | QuantizedRows, weight: Weight, *, gated: bool = False
    ) -> dict[str, int] | None:
        values, matrix = (part[0] if isinstance(part, tuple) else part for part in (rows, weight))
        width = len(matrix) // 2 if gated else len(matrix)
        return skinny_plan(len(values), width, matrix.shape[1], gated=gated, scaled=in_fp8(weight))


def _rotation(model: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, float32 (positions, head_dim / 2)."""
    frequencies = model.rotary_emb.inv_freq.double()
    positions = torch.arange(int(model.config.max_position_embeddings), device=frequencies.device)
    angles = positions.double()[:, None] * frequencies
    scaling = float(model.rotary_emb.attention_scaling)
    return (angles.cos() * scaling).float(), (angles.sin() * scaling).float()


def _layer(layer: Any, quantized: bool, *, mixed: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def fused(*modules: Any, mixed: bool = False) -> Weight:
        parts = [module.weight.detach() for module in modules]
        weight = interleaved(*parts) if mixed else weight_of(parts, quantized=quantized)
        for module in modules:
            module.weight = None  # the model's own copy goes, layer by layer
        return weight

    return _Layer(
        norm=layer.input_layernorm.weight.detach(),
        qkv=fused(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=(attention.q_norm.weight.detach(), attention.k_norm.weight.detach()),
        o_proj=fused(attention.o_proj),
        middle_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=fused(mlp.gate_proj, mlp.up_proj, mixed=mixed),
        down=fused(mlp.down_proj),
    )
