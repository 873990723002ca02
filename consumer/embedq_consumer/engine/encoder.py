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
    Footprint,
    LoadOptions,
    Memory,
    ModelError,
    Pending,
    Text,
    TextTooLong,
    Tokens,
    cpu_tokens,
)
from embedq_consumer.engine.cuda_graphs import Graphs
from embedq_consumer.engine.dense import DenseLayers
from embedq_consumer.engine.device import means_out_of_memory, memory, translate_errors, translated
from embedq_consumer.engine.kernels.attention import Packing
from embedq_consumer.engine.kernels.cpu_products import FEW_TOKENS, FEW_TOKENS_BESIDE_BF16
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.models import registry
from embedq_consumer.engine.models.traits import ForwardOptions, Limits, Probe, last_norm_eps_of
from embedq_consumer.engine.pooling import Pooling, pooling_of
from embedq_consumer.engine.row import HiddenForward, positions_of
from embedq_consumer.engine.safety.panics import first_line
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from embedq_shared.grouping import batched_by

__all__ = ["PackedEncoder", "release"]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

_NONE: Ids = np.empty(0, dtype=np.int32)
_GRAPHS_A_STEP = 4
"""Graphs that go at once while others' micro-batches run: each takes some time of the thread that feeds the device."""
_PROBE_COSINE = {torch.float32: 1 - 1e-6, torch.bfloat16: 0.99, torch.float16: 0.99}
"""In float32, a thousandth of a vector's length: a hundred times what rounding takes, and less than what a text sees of its
neighbors where they are not kept apart."""
_PROBE_COSINE_ROUNDED = 0.9999
"""Of a checkpoint that is quantized: where activations are rounded, too, the last bit may decide between two steps."""
_PROBE_COSINE_FP8 = 0.9
"""Far below what FP8 gives on trained weights, far above what a wrong forward gives on any."""


class _Computed(msgspec.Struct, frozen=True):
    """Vectors that were there when `submit` returned."""

    vectors: Vectors

    @property
    def ready(self) -> bool:
        return True

    def result(self) -> Vectors:
        return self.vectors


class _InOrder(msgspec.Struct, frozen=True):
    """`vectors` of texts with spans, which are there, and of those without (`plain`), which `pending` will have."""

    pending: Pending
    plain: npt.NDArray[np.intp]
    vectors: Vectors

    @property
    def ready(self) -> bool:
        return self.pending.ready

    def result(self) -> Vectors:
        self.vectors[self.plain] = self.pending.result()
        return self.vectors


class PackedEncoder:
    """The `Encoder` of engine/api.py.

    Weights and compute are bf16 on CUDA and, unless `quantization` says bf16, float32 on the CPU; pooling, and the last norm
    where only pooled tokens need it, are float32 on both. Nothing changes between `load` and `close`.
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
        """
        quantized = options.quantization == "fp8"
        if options.quantization != "none" and directory.quantization_method is not None:
            raise ModelError(
                f"quantization {options.quantization}: the checkpoint is already quantized "
                f"({directory.quantization_method})"
            )
        self.model_version: str = version
        hidden = int(model.config.hidden_size)
        self._pooling: Pooling = pooling_of(directory.pooling)
        self.hidden_size: int = (
            directory.dense[-1].width_out if directory.dense else self._pooling.width(hidden)
        )
        self.max_tokens: int = limits.max_tokens
        self.prompts: Mapping[str, str] = directory.prompts
        self.default_prompt: str = directory.default_prompt
        self.phases: Mapping[str, float] = {}
        self.notes: Sequence[str] = tokenizer.notes
        self.late_chunks: bool = self._pooling.supports_spans
        self.weight_bytes: int = 0
        self.footprint: Footprint | None = None
        self._tokenizer = tokenizer
        self._limits = limits
        self._device: torch.device = model.device
        self._at_once = (
            sys.maxsize
            if self._device.type == "cuda"
            else cpu_tokens(torch.get_num_threads(), options.quantization)
        )
        self._dense = DenseLayers(directory.dense, self._device)
        self._model = model
        self._vocabulary: int = int(model.config.vocab_size)
        self._deterministic = options.deterministic
        bf16 = options.quantization == "bf16"
        dtype = torch.bfloat16 if bf16 else model.dtype
        self._least_cosine = _PROBE_COSINE_FP8 if quantized else _PROBE_COSINE[dtype]
        if directory.quantization_method is not None:
            self._least_cosine = min(self._least_cosine, _PROBE_COSINE_ROUNDED)
        last_norm_weight, self._last_norm = _take_last_norm(model, self._pooling)
        built = registry.build(
            model,
            ForwardOptions(
                pooling=self._pooling,
                limits=limits,
                last_norm=last_norm_weight,
                quantized=quantized,
                keep_bf16=frozenset(options.keep_bf16),
                bf16=bf16,
                deterministic=options.deterministic,
            ),
            written_out=directory.quantization_method is None,
        )
        self.kernels: Mapping[str, str] = built.kernels
        self._forward: HiddenForward | None = built.hidden
        self._takes_positions = built.takes_positions
        self._slower = built.slower
        self._teams = built.teams
        self._graphs: Graphs | None = None
        if built.pooled is not None and not directory.dense:
            self._graphs = Graphs(built.pooled, deterministic=options.deterministic)

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong | Failed]:
        found = self._tokenizer.tokenize(texts)
        if self._graphs is None or not self._graphs.shares_prefixes:
            return found
        known = self._graphs.known_prefixes(
            [each.ids if isinstance(each, Tokens) else _NONE for each in found]
        )
        return [
            msgspec.structs.replace(each, shared=shared) if shared and isinstance(each, Tokens) else each
            for each, shared in zip(found, known, strict=True)
        ]

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
        texts = [Tokens(ids, whole=True) for ids in batch]
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
            for i, pooled in self._teams.each(self._run_spans, batch, part, lambda text: len(text.ids)):
                # As in `_computed`: a neighbor may have spoiled it.
                alone = len(part) > 1 and not np.isfinite(pooled.sum())
                vectors[rows[i] : rows[i + 1]] = self._run_spans([batch[i]])[0] if alone else pooled
        return _InOrder(self._submit([batch[i] for i in plain]), rows[plain], vectors)

    def _computed(self, batch: Sequence[Ids]) -> _Computed:
        if len(batch) == 1 and len(batch[0]):
            return _Computed(self._run(batch))
        vectors = np.zeros((len(batch), self.hidden_size), dtype=np.float32)
        # Neighbors of equal length share an attention call.
        order = sorted((i for i, ids in enumerate(batch) if len(ids)), key=lambda i: len(batch[i]))
        for part in self._parts(batch, order):
            for i, vector in self._teams.each(self._run, batch, part, len):
                vectors[i] = vector
        # A kernel may multiply a neighbor's NaN by the zero that keeps the texts apart; a text alone has no neighbor.
        nonfinite = ~np.logical_and.reduce(np.isfinite(vectors), axis=1)
        for i in np.flatnonzero(nonfinite).tolist():
            vectors[i] = self._run([batch[i]])[0]
        return _Computed(vectors)

    def close_some(self) -> bool:
        if self._graphs is not None and self._graphs.drop(_GRAPHS_A_STEP):
            return True
        self.close()
        return False

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
        return batched_by(order, lambda i: len(batch[i]), 0 if self._deterministic else self._at_once)

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

    def _hidden(
        self, sequences: Sequence[Ids], starts: Sequence[int] | None = None
    ) -> tuple[Tensor, Packing]:
        """Last hidden states of `sequences` in one row; `starts`, if given: their first tokens' positions, as if more went before."""
        if self._forward is None:
            raise RuntimeError("encode after close. This is a bug.")
        lengths = np.array([len(ids) for ids in sequences], dtype=np.int32)
        ids = np.concatenate(sequences, dtype=np.int32)
        positions = positions_of(ids, lengths, self._limits.padding) + self._limits.row_offset
        if starts is not None:
            positions += np.repeat(np.array(starts, dtype=np.int32), lengths)
        packing = Packing.of(lengths.tolist(), self._device, starts)
        row, column = (
            torch.from_numpy(each.astype(np.int64)).to(self._device, non_blocking=True)
            for each in (ids, positions)
        )
        return self._forward(row, column, packing), packing

    def _finish(self, pooled: Tensor) -> Tensor:
        """What comes after pooling, float32 (vectors, hidden) to (vectors, hidden_size), on the device."""
        return self._dense(pooled if self._last_norm is None else self._last_norm(pooled))

    def capture(self) -> None:
        """Capture every CUDA graph now, so that no text waits for one."""
        if self._graphs is not None:
            self._graphs.capture()

    def prove(self, probes: Sequence[Probe], expected: Tensor) -> None:
        """Compare each token's hidden state with `expected`, where that is finite.

        An architecture whose attention, positions or masks do not survive packing is found here, before it gives vectors: its
        texts run by length from now on.

        Raises:
            NotImplementedError: they differ that way, too.
        """
        problem = self._problem(probes, expected)
        if problem is not None and self._slower is not None:
            slower = self._slower()
            self._forward, self._takes_positions = slower.hidden, slower.takes_positions
            self.kernels = {**slower.kernels, "not_packed": problem}
            if (second := self._problem(probes, expected)) is None:
                problem = None
            else:
                problem = f"neither packed ({problem}) nor by length ({second})"
        self._slower = None
        if problem is not None:
            raise NotImplementedError(problem)

    def _problem(self, probes: Sequence[Probe], expected: Tensor) -> str | None:
        """What speaks against the forward that serves; None if it gives what is `expected`."""
        parts = expected.split([len(probe.ids) for probe in probes])
        whole = [n for n, probe in enumerate(probes) if probe.start == 0]
        of_whole = [probes[n] for n in whole], torch.cat([parts[n] for n in whole])
        try:
            asked = (probes, expected) if self._takes_positions else of_whole
            problem = self._difference(*asked)
            if problem is None and (
                self.kernels.get("few_rows", "plain") != "plain" or "products" in self.kernels
            ):
                # These are few tokens; many times over, they are not.
                problem = self._difference(*_repeated(*asked, FEW_TOKENS + 1))
            if problem is None and "products" in self.kernels:
                # Beside bf16 fewer are few: one text alone.
                few = [n for n in whole if len(probes[n].ids) <= FEW_TOKENS_BESIDE_BF16]
                one = max(few, key=lambda n: len(probes[n].ids))
                problem = self._difference([probes[one]], parts[one])
            if problem is None and self._graphs is not None:
                # In a row of a graph every text begins at its first position.
                problem = self._difference_of_graphs(*of_whole)
        except Exception as error:  # an architecture may fail in any way
            if means_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {first_line(error)}"
        return problem

    @torch.inference_mode()
    def _difference(self, probes: Sequence[Probe], expected: Tensor) -> str | None:
        hidden, _ = self._hidden([probe.ids for probe in probes], [probe.start for probe in probes])
        hidden = hidden.float()
        if self._last_norm is not None:
            hidden = self._last_norm(hidden)
        if hidden.shape != expected.shape:
            return f"hidden states of the shape {tuple(hidden.shape)}, expected {tuple(expected.shape)}"
        return self._said(hidden, expected)

    @torch.inference_mode()
    def _difference_of_graphs(self, probes: Sequence[Probe], expected: Tensor) -> str | None:
        """The same for pooled vectors: few tokens and many take different kernels, so the probes once, and many times over."""
        assert self._graphs is not None
        sequences = [probe.ids for probe in probes]
        ends = Packing.of([len(ids) for ids in sequences], self._device).cu_seqlens
        wanted = self._pooling.pool(expected, ends)
        problems = (
            self._said(
                torch.from_numpy(self._graphs.encode(sequences * times)).to(expected),
                wanted.repeat(times, 1),
            )
            for times in (1, 16)
        )
        return next((problem for problem in problems if problem is not None), None)

    def _said(self, found: Tensor, wanted: Tensor) -> str | None:
        finite = wanted.isfinite().all(dim=1)
        # In double precision: float32 would round the cosines themselves to what they are compared with.
        cosines = F.cosine_similarity(found[finite].double(), wanted[finite].double(), dim=1)
        if bool((cosines >= self._least_cosine).all()):
            return None
        return "packed sequences do not give the same as each one alone"


def _repeated(probes: Sequence[Probe], expected: Tensor, tokens: int) -> tuple[list[Probe], Tensor]:
    """The same so many times over that they have at least `tokens`."""
    times = -(-tokens // len(expected))
    return [*probes] * times, expected.repeat(times, 1)


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
