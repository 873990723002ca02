"""The engine: model directories in, vectors out. The only package that imports torch, transformers and tokenizers.

The service sees `load_encoder`, the `Encoder` that it returns, and the values that go in and out: `Text`, what is made of
it (`Tokens`, `Chunked`, `TextTooLong`), and `Pending` vectors. Importing this module imports none of the heavy libraries;
`load_encoder` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_shared.messages import Chunking

__all__ = [
    "Chunked",
    "DeviceLost",
    "Encoder",
    "Memory",
    "ModelError",
    "OutOfMemory",
    "Pending",
    "Piece",
    "Quantization",
    "Text",
    "TextTooLong",
    "Tokens",
    "Truncate",
    "count_gpus",
    "default_batch_tokens",
    "load_encoder",
]

Truncate = Literal["error", "start", "end"]
Quantization = Literal["none", "fp8"]


class ModelError(Exception):
    """A model directory cannot be served; the message names the file and what was expected."""


class OutOfMemory(Exception):
    """The device has too little memory left for a micro-batch; a smaller one may fit."""


class DeviceLost(Exception):
    """The device's context is broken: everything that this process asks of it from now on fails."""


class Memory(msgspec.Struct, frozen=True):
    """A device's memory in bytes. `peak` is the most that this process used at once since the last time it was asked."""

    free: int
    total: int
    peak: int


class Text(msgspec.Struct, frozen=True):
    """One text to tokenize: `prompt + text`, cut as `truncate` says if it is longer than the model takes.

    `chunk` is for `Encoder.chunk` alone, which cuts nothing off.
    """

    text: str
    prompt: str = ""
    truncate: Truncate = "error"
    chunk: Chunking | None = None


class Tokens(msgspec.Struct, frozen=True):
    """What the model runs for one text: `ids` is int32 (n,), special tokens included.

    `shared` says how many of the first ids are an instruction's, the same for every text that it stands in front of:
    their keys and values are computed once. 0 where the model cannot share them, or nothing is to be shared.
    """

    ids: npt.NDArray[np.int32]
    truncated: bool = False
    shared: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    """Ranges of `ids` that get a vector each; none: the text gets one."""

    @property
    def cost(self) -> int:
        """Tokens that run for this text, of a micro-batch's budget."""
        return len(self.ids) - self.shared

    @property
    def rows(self) -> int:
        """How many vectors come of it."""
        return len(self.spans) or 1


class Chunked(msgspec.Struct, frozen=True):
    """One text in windows that the model takes, each with the prompt and the special tokens around it.

    In mode late a window's `spans` get a vector each; in mode mean, and for a text without tokens, a window gets one.
    `pieces` says for each of these vectors, in order, which characters it stands for, as `[start, end)`, and how many
    tokens of the text: the pieces tile the text.
    """

    windows: tuple[Tokens, ...]
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """All that run for the text."""
        return sum(len(window.ids) for window in self.windows)


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one vector of a chunked text stands for."""

    start: int
    end: int
    tokens: int


class TextTooLong(msgspec.Struct, frozen=True):
    """The text has `tokens` tokens, special tokens included, and `truncate` is "error"."""

    tokens: int
    limit: int


class Pending(Protocol):
    """Vectors that the device computes, or has computed."""

    def result(self) -> npt.NDArray[np.float32]:
        """Wait for them: pooled, not yet normalized, float32 (rows, hidden_size), on the host. To be called once."""


class Encoder(Protocol):
    """One loaded model. `tokenize` may be called from any thread, `submit` and `encode` from one thread at a time."""

    model_version: str
    """`sha256:` and 64 hex digits over weights, tokenizer, pooling and prompts: equal exactly when vectors are comparable."""
    hidden_size: int
    """Components of a vector: the model's own width, or that of its last Dense module."""
    max_tokens: int
    """Longest input, special tokens included."""
    prompts: Mapping[str, str]
    """Prompts by name (`query`, `document`, …), from `config_sentence_transformers.json`."""
    late_chunks: bool
    """Whether spans of a text have vectors of their own: not where a text's vector is that of its first token."""
    default_prompt: str
    """What a text without `input_type` or instruction gets in front; `""` for most models."""
    phases: Mapping[str, float]
    """Seconds of each step of the load, in order."""

    @property
    def kernels(self) -> Mapping[str, str]:
        """Which kernels run, and why not faster ones.

        `attention`: `flash_attn_4`, `torch_varlen` or `row_attention` on a GPU, `packed` where transformers' own layers call
        one of the first two, `torch_sdpa` on a CPU. `gate`, of Qwen3 on a GPU: in the product in front of it, or behind.
        """

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | TextTooLong]:
        """Tokens of each text, in order."""

    def chunk(self, texts: Sequence[Text]) -> list[Chunked | TextTooLong]:
        """The same for texts that are to be run in pieces; from any thread. Refused is a text whose prompt takes more than
        half of `max_tokens`, which is then the `limit`: each window would run mostly prompt."""

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        """Start on one micro-batch: `rows` vectors for each text, in order. On a GPU it returns while the device computes,
        so that the next micro-batch can be submitted; `result` may then be called from another thread.

        Raises, and so does `result`:
            OutOfMemory: nothing else is harmed, and a smaller micro-batch may run.
            DeviceLost: nothing will run on this device until the process ends.
        """

    def encode(self, batch: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """`submit` and wait, for plain ids: float32 (len(batch), hidden_size)."""

    def memory(self) -> Memory | None:
        """What the device has left; None on a CPU, whose memory is everybody's."""

    def close(self) -> None:
        """Release the weights' memory. The encoder must not be used afterwards."""


def count_gpus() -> int:
    """CUDA devices that this machine's processes may use; asked in another one, so that this one loads no PyTorch."""
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(asked.stdout)


def default_batch_tokens(device: str) -> int:
    """A token budget that keeps the device busy without holding up the texts behind it."""
    if device == "auto":
        _before_torch()
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return 2_048 if device == "cpu" else 16_384


def load_encoder(
    path: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    quantization: Quantization = "none",
    keep_bf16: Collection[int] = (),
    deterministic: bool = False,
    known_models: Path | None = None,
) -> Encoder:
    """Load a directory in Hugging Face / sentence-transformers layout.

    `device` is "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N". bf16 on CUDA, float32 on the CPU.
    `threads` is how many threads PyTorch may use on the CPU, process-wide; all cores unless given.
    `quantization` "fp8" quantizes the weights while loading and the activations as they come; CUDA from compute
    capability 9.0 on. Layers whose numbers are in `keep_bf16` stay as they are; negative ones count from the end.
    `deterministic` makes a text's vector bit-equal whatever runs beside it, on the same device and software; it costs
    throughput, and shares no prefixes.
    `known_models` is a folder for what transformers says of a model: the next load of the same one finds it there and does
    without transformers.

    Raises:
        ModelError: the directory is incomplete, or asks for something that embedq does not run.
    """
    _before_torch()
    from embedq_consumer.engine.loading.load_cache import LoadCache
    from embedq_consumer.engine.loading.loader import load

    return load(
        path,
        device=device,
        threads=threads,
        quantization=quantization,
        keep_bf16=keep_bf16,
        deterministic=deterministic,
        known_models=None if known_models is None else LoadCache(known_models),
    )


def _before_torch() -> None:
    """Set what PyTorch's OpenMP reads when it loads, so before anything imports torch.

    Its threads spin 300,000 times while they wait for each other; on cores shared with the event loop and a broker that
    is most of what they do, and batches take up to ten times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
