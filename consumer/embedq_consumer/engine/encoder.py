"""PackedEncoder: any architecture that transformers knows, run without padding.

A batch becomes one row of concatenated tokens with restarting positions; attention keeps the sequences apart (see
attention.py), and everything else in a transformer works token by token. So a batch of mixed lengths costs what its
tokens cost, and gives what each text alone gives.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine import (
    Chunked,
    Memory,
    ModelError,
    Pending,
    Quantization,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.engine.device import guarded, memory
from embedq_consumer.engine.kernels.attention import PACKED, Packing, register
from embedq_consumer.engine.loading.memory_check import PART_TOKENS
from embedq_consumer.engine.loading.weights import last_norm_eps_of
from embedq_consumer.engine.model_directory import ModelDirectory, Pooling
from embedq_consumer.engine.models.bert_cpu import PackedBert
from embedq_consumer.engine.pooling import DenseLayers
from embedq_consumer.engine.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from embedq_consumer.engine.cuda_graphs import Graphs

__all__ = ["PackedEncoder", "release"]

Ids = npt.NDArray[np.int32]
_Forward = Callable[[Tensor, Tensor, Packing], Tensor]
"""(ids, positions, packing) → last hidden states (tokens, hidden)."""

_CPU_TOKENS = 1024
"""Tokens run at once on a CPU: fewer leave the cores idle, many more leave the caches (benchmarks/encoder_cpu.py)."""
_PROBE_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99, torch.float16: 0.99}
_PROBE_COSINE_FP8 = 0.9
"""Far below what FP8 gives on trained weights, far above what a wrong forward gives on any."""


class _Computed(msgspec.Struct, frozen=True):
    """Vectors that were there when `submit` returned."""

    vectors: npt.NDArray[np.float32]

    def result(self) -> npt.NDArray[np.float32]:
        return self.vectors


class _InOrder(msgspec.Struct, frozen=True):
    """Rows of texts without spans, which `pending` will have, and those of texts with spans, which are there."""

    pending: Pending
    plain: npt.NDArray[np.intp]
    vectors: npt.NDArray[np.float32]

    def result(self) -> npt.NDArray[np.float32]:
        self.vectors[self.plain] = self.pending.result()
        return self.vectors


class PackedEncoder:
    """The `Encoder` of engine/__init__.py, over transformers' own model code.

    Weights and compute are bf16 on CUDA and float32 on the CPU; pooling, and the last norm where only last tokens need
    it, are float32 on both. Nothing changes after `load`, until `close`.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        model: Any,
        tokenizer: TextTokenizer,
        *,
        version: str,
        max_tokens: int,
        position_offset: int,
        quantization: Quantization = "none",
        deterministic: bool = False,
        keep_bf16: Collection[int] = (),
    ) -> None:
        """Takes `model` over: its attention, pooler and last norm are replaced."""
        self.model_version: str = version
        hidden = int(model.config.hidden_size)
        self.hidden_size: int = directory.dense[-1].width_out if directory.dense else hidden
        self.max_tokens: int = max_tokens
        self.prompts: Mapping[str, str] = directory.prompts
        self.default_prompt: str = directory.default_prompt
        self.phases: Mapping[str, float] = {}
        self._tokenizer = tokenizer
        self._pooling: Pooling = directory.pooling
        self.late_chunks: bool = directory.pooling != "cls"
        self._position_offset = position_offset
        self._device: torch.device = model.device
        self._dense = DenseLayers(directory.dense, self._device)
        self._model = model
        self._vocabulary: int = int(model.config.vocab_size)
        self._last_norm_weight: Tensor | None = None
        self._last_norm = None
        if directory.pooling == "lasttoken":
            weight = getattr(getattr(model, "norm", None), "weight", None)
            self._last_norm = _take_last_norm(model)
            self._last_norm_weight = None if self._last_norm is None else weight
        self._quantization = quantization
        self._deterministic = deterministic
        self._keep_bf16 = keep_bf16
        self._dtype: torch.dtype = model.dtype
        self._graphs: Graphs | None = None
        self._forward: _Forward | None
        if directory.quantization_method is not None:
            # The written-out forwards take weights as they are, and these are in a form that only their layers know.
            if quantization != "none":
                raise ModelError(
                    f"quantization {quantization}: the checkpoint is quantized already "
                    f"({directory.quantization_method})"
                )
            self._forward = _packed(model)
        elif self._device.type == "cuda" and _has_triton():
            self._forward = self._on_cuda(model)
        elif quantization != "none":
            raise ModelError(f"quantization {quantization}: needs CUDA and Triton")
        else:
            self._forward = PackedBert(model) if PackedBert.fits(model) else _packed(model)

    @staticmethod
    def is_written_out(model: Any) -> bool:
        """Whether `model` would run a forward of ours, which needs its weights and none of transformers' code."""
        if model.device.type == "cpu":
            return PackedBert.fits(model)
        if not _has_triton():
            return False
        from embedq_consumer.engine.models.bert_cuda import PackedBertCuda
        from embedq_consumer.engine.models.qwen3_cuda import PackedQwen3

        return PackedBertCuda.fits(model) or PackedQwen3.fits(model)

    def _on_cuda(self, model: Any) -> _Forward:
        """A forward written for the model where there is one, else transformers' own."""
        from embedq_consumer.engine.cuda_graphs import Graphs, graph_limit
        from embedq_consumer.engine.kernels.fp8 import fp8_available
        from embedq_consumer.engine.models.bert_cuda import PackedBertCuda
        from embedq_consumer.engine.models.qwen3_cuda import PackedQwen3

        quantized = self._quantization == "fp8"
        if quantized and not fp8_available(self._device):
            raise ModelError("quantization fp8: needs a GPU of compute capability 9.0 or later")
        if PackedBertCuda.fits(model):
            bert = PackedBertCuda(
                model,
                pooling=self._pooling,
                max_tokens=self.max_tokens,
                position_offset=self._position_offset,
                quantized=quantized,
                keep=self._keep_bf16,
                deterministic=self._deterministic,
            )
            if not self._dense:
                self._graphs = Graphs(
                    bert.pooled,
                    bert.hidden_size,
                    self._device,
                    graph_limit=graph_limit(bert.attention, self.max_tokens),
                    part_tokens=PART_TOKENS,
                    deterministic=self._deterministic,
                )
            return bert
        if not PackedQwen3.fits(model):
            if quantized:
                raise ModelError(f"quantization fp8: {type(model).__name__} has no FP8 forward")
            return _packed(model)
        forward = PackedQwen3(model, quantized=quantized, keep=self._keep_bf16)
        if self._last_norm_weight is not None and not self._dense:
            self._graphs = Graphs.over(forward, self._last_norm_weight, deterministic=self._deterministic)
        return forward

    @property
    def kernels(self) -> Mapping[str, str]:
        found: Mapping[str, str] | None = getattr(self._forward, "kernels", None)
        if found is not None:
            return found
        return {"attention": "torch_sdpa" if self._device.type == "cpu" else "packed"}

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        share = self._graphs is not None and self._graphs.shares_prefixes
        return self._tokenizer.tokenize(texts, share=share)

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong]:
        return self._tokenizer.chunk(texts, end_token=self._pooling == "lasttoken")

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        return guarded(self._device, lambda: self._start(batch))

    def memory(self) -> Memory | None:
        return memory(self._device)

    def _start(self, batch: Sequence[Tokens]) -> Pending:
        if any(tokens.spans for tokens in batch):
            return self._submit_spans(batch)
        return self._submit(batch)

    def encode(self, batch: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """A sequence of no tokens (an empty text, where the tokenizer adds none) gives zeros, as padding would."""
        texts = [Tokens(ids) for ids in batch]
        return guarded(self._device, lambda: self._submit(texts)).result()

    def _submit(self, batch: Sequence[Tokens]) -> Pending:
        ids = [tokens.ids for tokens in batch]
        self._check_tokens(ids)
        return self._computed(ids) if self._graphs is None else self._graphs.submit(batch)

    def _check_tokens(self, batch: Sequence[Ids]) -> None:
        """On CUDA the look-up itself would break the device's context, and with it every later batch."""
        if batch and np.concatenate(batch).max(initial=0) >= self._vocabulary:
            raise IndexError(f"a token beyond the model's {self._vocabulary} embeddings")

    def _submit_spans(self, batch: Sequence[Tokens]) -> Pending:
        """Texts with spans need every token's hidden state: they run here and now, without graphs, the others as ever."""
        rows = np.cumsum([0, *(tokens.rows for tokens in batch)])
        vectors = np.zeros((rows[-1], self.hidden_size), dtype=np.float32)
        plain = [i for i, tokens in enumerate(batch) if not tokens.spans]
        spanned = [i for i, tokens in enumerate(batch) if tokens.spans]
        self._check_tokens([batch[i].ids for i in spanned])
        spanned.sort(key=lambda i: len(batch[i].ids))
        for part in self._parts([tokens.ids for tokens in batch], spanned):
            found = self._run_spans([batch[i] for i in part])
            for i, pooled in zip(part, found, strict=True):
                # As in `_computed`: it may be a neighbour's fault.
                alone = self._device.type == "cuda" and len(part) > 1 and not np.isfinite(pooled.sum())
                vectors[rows[i] : rows[i + 1]] = self._run_spans([batch[i]])[0] if alone else pooled
        return _InOrder(self._submit([batch[i] for i in plain]), rows[plain], vectors)

    def _computed(self, batch: Sequence[Ids]) -> _Computed:
        vectors = np.zeros((len(batch), self.hidden_size), dtype=np.float32)
        # Neighbours of one length share an attention call.
        order = sorted((i for i, ids in enumerate(batch) if len(ids)), key=lambda i: len(batch[i]))
        for part in self._parts(batch, order):
            vectors[part] = self._run([batch[i] for i in part])
        if self._device.type == "cuda":
            # A kernel may multiply a neighbour's NaN by the zero that keeps the texts apart: who is alone has none.
            spoilt = ~np.logical_and.reduce(np.isfinite(vectors), axis=1)
            for i in np.flatnonzero(spoilt).tolist():
                vectors[i] = self._run([batch[i]])[0]
        return _Computed(vectors)

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._forward = self._last_norm = self._last_norm_weight = self._graphs = None
        self._dense = DenseLayers((), self._device)
        release(self._model)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _parts(self, batch: Sequence[Ids], order: list[int]) -> Iterator[list[int]]:
        """What runs at once: everything on CUDA, as much as the caches hold on a CPU; each alone if deterministic."""
        limit = _CPU_TOKENS if self._device.type == "cpu" else None
        limit = 0 if self._deterministic else limit
        part: list[int] = []
        tokens = 0
        for i in order:
            if part and limit is not None and tokens + len(batch[i]) > limit:
                yield part
                part, tokens = [], 0
            part.append(i)
            tokens += len(batch[i])
        if part:
            yield part

    @torch.inference_mode()
    def _run(self, sequences: Sequence[Ids]) -> npt.NDArray[np.float32]:
        hidden, packing = self._hidden(sequences)
        pooled: npt.NDArray[np.float32] = self._pool(hidden, packing).cpu().numpy()
        return pooled

    @torch.inference_mode()
    def _run_spans(self, batch: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """A vector for each span of each text, float32 (spans, hidden_size) a text."""
        hidden, _ = self._hidden([tokens.ids for tokens in batch])
        firsts = np.cumsum([0, *(len(tokens.ids) for tokens in batch[:-1])])
        spans = np.concatenate(
            [np.array(tokens.spans) + first for tokens, first in zip(batch, firsts, strict=True)]
        )
        pooled: npt.NDArray[np.float32] = self._pool_spans(hidden, spans).cpu().numpy()
        return np.split(pooled, np.cumsum([tokens.rows for tokens in batch])[:-1])

    def _pool_spans(self, hidden: Tensor, spans: npt.NDArray[np.int64]) -> Tensor:
        """As `_pool`, of ranges of the row: the last token's vector, or the mean of them all."""
        if self._pooling == "lasttoken":
            pooled = hidden[torch.from_numpy(spans[:, 1] - 1).to(hidden.device)].float()
            pooled = pooled if self._last_norm is None else self._last_norm(pooled)
        elif self._pooling == "mean":
            inside = np.concatenate([np.arange(begin, end) for begin, end in spans])
            tokens = hidden[torch.from_numpy(inside).to(hidden.device)].float()
            lengths = torch.from_numpy(spans[:, 1] - spans[:, 0]).to(hidden.device)
            pooled = torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)
        else:
            raise RuntimeError("spans of a model that pools its first token. This is a bug.")
        return self._dense(pooled)

    def _hidden(self, sequences: Sequence[Ids]) -> tuple[Tensor, Packing]:
        assert self._forward is not None, "encode after close. This is a bug."
        lengths = [len(ids) for ids in sequences]
        ids = np.concatenate(sequences, dtype=np.int64)
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]) + self._position_offset
        packing = Packing.of(lengths, self._device)
        row, column = (torch.from_numpy(a).to(self._device, non_blocking=True) for a in (ids, positions))
        return self._forward(row, column, packing), packing

    def _pool(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Float32 (sequences, hidden_size), on the device."""
        pooled = _pooled(hidden, packing.cu_seqlens, self._pooling)
        if self._last_norm is not None:
            pooled = self._last_norm(pooled)
        return self._dense(pooled)

    def capture(self) -> None:
        """Make every graph now, so that no text waits for one."""
        if self._graphs is not None:
            self._graphs.capture()

    @torch.inference_mode()
    def prove(self, sequences: Sequence[Ids], expected: Tensor) -> None:
        """Compare each token's hidden state with `expected`, where that is finite.

        An architecture that attends, counts positions or masks in a way that packing breaks shows here, not in vectors.
        """
        hidden, packing = self._hidden(sequences)
        hidden = hidden.float()
        if self._last_norm is not None:
            hidden = self._last_norm(hidden)
        finite = expected.isfinite().all(dim=1)
        cosines = F.cosine_similarity(hidden[finite], expected[finite], dim=1)
        least = _PROBE_COSINE_FP8 if self._quantization == "fp8" else _PROBE_COSINE[self._dtype]
        if self._graphs is not None:
            # Few tokens and many take different kernels: the same sequences once, and many times over.
            for times in (1, 16):
                vectors = torch.from_numpy(self._graphs.encode(list(sequences) * times)).to(expected)
                wanted = _pooled(expected, packing.cu_seqlens, self._pooling).repeat(times, 1)
                known = wanted.isfinite().all(dim=1)
                cosines = torch.cat([cosines, F.cosine_similarity(vectors[known], wanted[known], dim=1)])
        if not bool((cosines >= least).all()):
            raise NotImplementedError("packed sequences do not give what each gives alone")


def _pooled(hidden: Tensor, cu: Tensor, pooling: Pooling) -> Tensor:
    """Float32 (sequences, hidden): each sequence's first or last token, or the mean over all of its own."""
    if pooling == "cls":
        return hidden[cu[:-1].long()].float()
    if pooling == "lasttoken":
        return hidden[cu[1:].long() - 1].float()
    return torch.segment_reduce(hidden.float(), "mean", lengths=cu.diff().long(), unsafe=True)


def release(model: Any) -> None:
    """Free the memory of `model`'s weights, whoever still refers to it.

    Modules refer to each other in cycles, and a collection of those would stop every thread for a quarter of a second: so
    the weights go by hand, and the small rest is left to the collector.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def _take_last_norm(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Take an RMS norm off the end of `model`, to run it in float32 on the pooled tokens alone."""
    eps = last_norm_eps_of(model)
    if eps is None:
        return None
    weight = model.norm.weight.float()
    model.norm = torch.nn.Identity()
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _packed(model: Any) -> _Forward:
    register()
    model.pooler = None
    model.set_attn_implementation(PACKED)

    def forward(ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        output = model(input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), packing=packing)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    return forward
