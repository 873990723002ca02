"""PackedEncoder: any architecture that transformers knows, run without padding.

A batch becomes one row of concatenated tokens with restarting positions; attention keeps the sequences apart (see
kernels/attention.py), and everything else in a transformer works token by token. So a batch of mixed lengths costs what its
tokens cost, and each text gets the vector that it gets alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedq_consumer.engine.api import (
    Chunked,
    Failed,
    LoadOptions,
    Memory,
    ModelError,
    Pending,
    Text,
    TextTooLong,
    Tokens,
)
from embedq_consumer.engine.cuda_graphs import Graphs
from embedq_consumer.engine.dense import DenseLayers
from embedq_consumer.engine.device import memory, translate_errors, translated
from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.models import registry
from embedq_consumer.engine.models.traits import ForwardOptions, Limits, last_norm_eps_of
from embedq_consumer.engine.pooling import POOLINGS, Pooling
from embedq_consumer.engine.row import HiddenForward
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from embedq_shared.grouping import batched_by

__all__ = ["PackedEncoder", "release"]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

_CPU_TOKENS = 1024
"""Tokens run at once on a CPU: fewer leave the cores idle, many more fall out of the caches (benchmarks/encoder_cpu.py)."""
_PROBE_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99, torch.float16: 0.99}
_PROBE_COSINE_FP8 = 0.9
"""Far below what FP8 gives on trained weights, far above what a wrong forward gives on any."""


class _Computed(msgspec.Struct, frozen=True):
    """Vectors that were there when `submit` returned."""

    vectors: Vectors

    def result(self) -> Vectors:
        return self.vectors


class _InOrder(msgspec.Struct, frozen=True):
    """`vectors` of texts with spans, which are there, and of those without (`plain`), which `pending` will have."""

    pending: Pending
    plain: npt.NDArray[np.intp]
    vectors: Vectors

    def result(self) -> Vectors:
        self.vectors[self.plain] = self.pending.result()
        return self.vectors


class PackedEncoder:
    """The `Encoder` of engine/api.py.

    Weights and compute are bf16 on CUDA and float32 on the CPU; pooling, and the last norm where only pooled tokens need
    it, are float32 on both. Nothing changes between `load` and `close`.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        model: Any,
        tokenizer: TextTokenizer,
        *,
        version: str,
        limits: Limits,
        options: LoadOptions,
    ) -> None:
        """Takes `model` apart: its attention, pooler and last norm are replaced. `options.keep_bf16` counts from 0 on.

        Raises:
            ModelError: model and device cannot run what `options` ask for.
            NotImplementedError: the architecture's attention cannot be packed.
        """
        quantized = options.quantization != "none"
        if quantized and directory.quantization_method is not None:
            raise ModelError(
                f"quantization {options.quantization}: the checkpoint is already quantized "
                f"({directory.quantization_method})"
            )
        self.model_version: str = version
        hidden = int(model.config.hidden_size)
        self.hidden_size: int = directory.dense[-1].width_out if directory.dense else hidden
        self.max_tokens: int = limits.max_tokens
        self.prompts: Mapping[str, str] = directory.prompts
        self.default_prompt: str = directory.default_prompt
        self.phases: Mapping[str, float] = {}
        self._pooling: Pooling = POOLINGS[directory.pooling]
        self.late_chunks: bool = self._pooling.supports_spans
        self._tokenizer = tokenizer
        self._position_offset = limits.position_offset
        self._device: torch.device = model.device
        self._dense = DenseLayers(directory.dense, self._device)
        self._model = model
        self._vocabulary: int = int(model.config.vocab_size)
        self._deterministic = options.deterministic
        self._least_cosine = _PROBE_COSINE_FP8 if quantized else _PROBE_COSINE[model.dtype]
        last_norm_weight, self._last_norm = _take_last_norm(model, self._pooling)
        built = registry.build(
            model,
            ForwardOptions(
                pooling=self._pooling,
                limits=limits,
                last_norm=last_norm_weight,
                quantized=quantized,
                keep_bf16=frozenset(options.keep_bf16),
                deterministic=options.deterministic,
            ),
            written_out=directory.quantization_method is None,
        )
        self.kernels: Mapping[str, str] = built.kernels
        self._forward: HiddenForward | None = built.hidden
        self._graphs: Graphs | None = None
        if built.pooled is not None and not directory.dense:
            self._graphs = Graphs(built.pooled, deterministic=options.deterministic)

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong | Failed]:
        share = self._graphs is not None and self._graphs.shares_prefixes
        return self._tokenizer.tokenize(texts, share=share)

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong | Failed]:
        return self._tokenizer.chunk(texts, end_token=self._pooling.end_token)

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        return translated(self._device, lambda: self._start(batch))

    def memory(self) -> Memory | None:
        with translate_errors(self._device):
            return memory(self._device)

    def _start(self, batch: Sequence[Tokens]) -> Pending:
        if any(tokens.spans for tokens in batch):
            return self._submit_spans(batch)
        return self._submit(batch)

    def encode(self, batch: Sequence[Ids]) -> Vectors:
        """A sequence of no tokens (an empty text, where the tokenizer adds none) gives zeros, as padding would."""
        texts = [Tokens(ids) for ids in batch]
        return translated(self._device, lambda: self._submit(texts)).result()

    def _submit(self, batch: Sequence[Tokens]) -> Pending:
        ids = [tokens.ids for tokens in batch]
        self._check_tokens(ids)
        return self._computed(ids) if self._graphs is None else self._graphs.submit(batch)

    def _check_tokens(self, batch: Sequence[Ids]) -> None:
        """Here, since on CUDA the look-up would break the device's context, and with it every later batch."""
        if batch and np.concatenate(batch).max(initial=0) >= self._vocabulary:
            raise IndexError(f"a token beyond the model's {self._vocabulary} embeddings")

    def _submit_spans(self, batch: Sequence[Tokens]) -> Pending:
        """Texts with spans need every token's hidden state: they run at once, without graphs; the others are submitted."""
        rows = np.cumsum([0, *(tokens.rows for tokens in batch)])
        vectors = np.zeros((rows[-1], self.hidden_size), dtype=np.float32)
        plain = [i for i, tokens in enumerate(batch) if not tokens.spans]
        spanned = [i for i, tokens in enumerate(batch) if tokens.spans]
        self._check_tokens([batch[i].ids for i in spanned])
        spanned.sort(key=lambda i: len(batch[i].ids))
        for part in self._parts([tokens.ids for tokens in batch], spanned):
            found = self._run_spans([batch[i] for i in part])
            for i, pooled in zip(part, found, strict=True):
                # As in `_computed`: a neighbor may have spoiled it.
                alone = self._device.type == "cuda" and len(part) > 1 and not np.isfinite(pooled.sum())
                vectors[rows[i] : rows[i + 1]] = self._run_spans([batch[i]])[0] if alone else pooled
        return _InOrder(self._submit([batch[i] for i in plain]), rows[plain], vectors)

    def _computed(self, batch: Sequence[Ids]) -> _Computed:
        vectors = np.zeros((len(batch), self.hidden_size), dtype=np.float32)
        # Neighbors of equal length share an attention call.
        order = sorted((i for i, ids in enumerate(batch) if len(ids)), key=lambda i: len(batch[i]))
        for part in self._parts(batch, order):
            vectors[part] = self._run([batch[i] for i in part])
        if self._device.type == "cuda":
            # A kernel may multiply a neighbor's NaN by the zero that keeps the texts apart; a text alone has no neighbor.
            nonfinite = ~np.logical_and.reduce(np.isfinite(vectors), axis=1)
            for i in np.flatnonzero(nonfinite).tolist():
                vectors[i] = self._run([batch[i]])[0]
        return _Computed(vectors)

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._forward = self._last_norm = self._graphs = None
        self._dense = DenseLayers((), self._device)
        release(self._model)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _parts(self, batch: Sequence[Ids], order: list[int]) -> Iterator[list[int]]:
        """What runs at once: everything on CUDA, as much as fits the caches on a CPU; each text alone if deterministic."""
        limit = _CPU_TOKENS if self._device.type == "cpu" else sys.maxsize
        return batched_by(order, lambda i: len(batch[i]), 0 if self._deterministic else limit)

    @torch.inference_mode()
    def _run(self, sequences: Sequence[Ids]) -> Vectors:
        hidden, packing = self._hidden(sequences)
        pooled: Vectors = self._finish(self._pooling.pool(hidden, packing.cu_seqlens)).cpu().numpy()
        return pooled

    @torch.inference_mode()
    def _run_spans(self, batch: Sequence[Tokens]) -> list[Vectors]:
        """A vector for each span of each text, float32 (spans, hidden_size) a text."""
        hidden, _ = self._hidden([tokens.ids for tokens in batch])
        firsts = np.cumsum([0, *(len(tokens.ids) for tokens in batch[:-1])])
        spans = np.concatenate(
            [np.array(tokens.spans) + first for tokens, first in zip(batch, firsts, strict=True)]
        )
        pooled: Vectors = self._finish(self._pooling.pool_spans(hidden, spans)).cpu().numpy()
        return np.split(pooled, np.cumsum([tokens.rows for tokens in batch])[:-1])

    def _hidden(self, sequences: Sequence[Ids]) -> tuple[Tensor, Packing]:
        if self._forward is None:
            raise RuntimeError("encode after close. This is a bug.")
        lengths = [len(ids) for ids in sequences]
        ids = np.concatenate(sequences, dtype=np.int64)
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]) + self._position_offset
        packing = Packing.of(lengths, self._device)
        row, column = (torch.from_numpy(a).to(self._device, non_blocking=True) for a in (ids, positions))
        return self._forward(row, column, packing), packing

    def _finish(self, pooled: Tensor) -> Tensor:
        """What comes after pooling, float32 (vectors, hidden) to (vectors, hidden_size), on the device."""
        return self._dense(pooled if self._last_norm is None else self._last_norm(pooled))

    def capture(self) -> None:
        """Capture every CUDA graph now, so that no text waits for one."""
        if self._graphs is not None:
            self._graphs.capture()

    @torch.inference_mode()
    def prove(self, sequences: Sequence[Ids], expected: Tensor) -> None:
        """Compare each token's hidden state with `expected`, where that is finite.

        An architecture whose attention, positions or masks do not survive packing is refused here, before it gives vectors.

        Raises:
            NotImplementedError: they differ.
        """
        hidden, packing = self._hidden(sequences)
        hidden = hidden.float()
        if self._last_norm is not None:
            hidden = self._last_norm(hidden)
        finite = expected.isfinite().all(dim=1)
        cosines = F.cosine_similarity(hidden[finite], expected[finite], dim=1)
        if self._graphs is not None:
            # Few tokens and many take different kernels: the same sequences once, and many times over.
            for times in (1, 16):
                vectors = torch.from_numpy(self._graphs.encode(list(sequences) * times)).to(expected)
                wanted = self._pooling.pool(expected, packing.cu_seqlens).repeat(times, 1)
                known = wanted.isfinite().all(dim=1)
                cosines = torch.cat([cosines, F.cosine_similarity(vectors[known], wanted[known], dim=1)])
        if not bool((cosines >= self._least_cosine).all()):
            raise NotImplementedError("packed sequences do not give the same as each one alone")


def release(model: Any) -> None:
    """Free the memory of `model`'s weights, whatever still refers to it.

    Modules refer to each other in cycles, and collecting those would stop every thread for a quarter of a second. So the
    weights are freed by hand, and the small rest is left to the collector.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def _take_last_norm(model: Any, pooling: Pooling) -> tuple[Tensor | None, Callable[[Tensor], Tensor] | None]:
    """Take an RMS norm off the end of `model`, to run it in float32 on the pooled tokens alone.

    Returns its weight and the norm; two None where the pooling needs all tokens normed, or there is no such norm.
    """
    eps = last_norm_eps_of(model)
    if eps is None or not pooling.needs_last_norm:
        return None, None
    weight: Tensor = model.norm.weight
    exact = weight.float()
    model.norm = torch.nn.Identity()
    return weight, lambda x: F.rms_norm(x, exact.shape, exact, eps)
