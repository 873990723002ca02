"""What the rest of the service knows of the engine: the values that go in and out, their errors, and the `Encoder` Protocol.

Imports none of the heavy libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import msgspec

from embedq_shared.messages import Chunking, Quantization

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Chunked",
    "DeviceLost",
    "Encoder",
    "Failed",
    "Footprint",
    "Found",
    "Inspection",
    "LoadArguments",
    "LoadOptions",
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
    "cpu_tokens",
]

Truncate = Literal["error", "start", "end"]


class ModelError(Exception):
    """A model directory cannot be served; the message names the file and what was expected."""


class OutOfMemory(Exception):
    """The device has too little memory left for a micro-batch; a smaller one may fit."""


class DeviceLost(Exception):
    """The device's context is broken: every later call from this process fails too."""


def cpu_tokens(threads: int, quantization: Quantization = "none") -> int:
    """Tokens that a CPU should run at once with so many threads: fewer leave its cores idle, many more fall out of their caches.

    MiniLM on a host of 16 cores, thousands of tokens a second with 1,024, 2,048 and 4,096 at once: for mixed lengths 29.8, 34.3 and 40.4
    with 16 threads, 24.1, 25.2 and 22.2 with 8, 11.5, 12.3 and 11.8 with 4; for 150 each 33.1, 37.8 and 39.8, 26.3, 25.9 and 24.5,
    14.1, 12.7 and 12.3. 8,192 at once were no better with 16, and threads may share fewer cores than a container's limits let them see.
    In bf16 they are half as large, and half as many again pay: with 2 threads 36.2 and 40.4 with 1,024 and 1,536 for mixed lengths, 35.5
    and 42.5 for 150 each, and no more with 4,096.
    """
    tokens = min(max(1_024, 256 * threads), 4_096)
    return tokens * 3 // 2 if quantization == "bf16" else tokens


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is loaded. The model version depends on `quantization`, `keep_bf16` and `deterministic` alone."""

    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N". Models run in bf16 on CUDA and, as `quantization` says, in float32 or bf16 on
    the CPU."""
    threads: int | None = None
    """Threads that PyTorch may use on the CPU, for the whole process; all cores unless given."""
    quantization: Quantization = "none"
    """"fp8" quantizes the weights while loading and the activations as they come; CUDA from compute capability 9.0 on. "bf16", on a
    CPU, rounds what is multiplied."""
    keep_bf16: tuple[int, ...] = ()
    """Numbers of the layers that `quantization` leaves in bf16; negative ones count from the end."""
    deterministic: bool = False
    """A text's vector is bit-equal whatever else is in its micro-batch, on the same device and software. Costs throughput,
    and shares no prefixes."""
    known_models: Path | None = None
    """A folder for what transformers says of a model: the next load of the same model finds it there and does without
    transformers."""
    root: Path | None = None
    """Links in the model directory may lead to files below it; None: to files below the directory itself alone."""
    dry_run_s: float | None = None
    """Seconds that a process of its own has to try a model that is not known yet, before this one loads it; None: not tried."""


class LoadArguments(TypedDict, total=False):
    """The fields of `LoadOptions` as keyword arguments."""

    device: str
    threads: int | None
    quantization: Quantization
    keep_bf16: tuple[int, ...]
    deterministic: bool
    known_models: Path | None
    root: Path | None
    dry_run_s: float | None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a model directory asks of its device, from its files' headers alone; bytes."""

    needed: int
    """At least, weights and the smallest micro-batches."""
    free: int
    total: int
    device: str
    hidden_size: int | None
    """Components of a vector; None where only the load will know."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides how much of its device's memory a micro-batch takes beside the weights. Models of which it is equal take the
    same for the same micro-batch, whatever their weights and texts say."""

    device: str
    """What the driver calls it: another one has other kernels."""
    architecture: str
    """`config.json`, without what only names the model."""
    dtype: str
    quantization: Quantization
    keep_bf16: tuple[int, ...]
    deterministic: bool
    kernels: tuple[tuple[str, str], ...]
    """As in `Encoder.kernels`, sorted."""
    pooling: tuple[str, ...]
    dense: tuple[tuple[int, int], ...]
    """Widths of the layers after the pooling."""
    max_tokens: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """A device's memory in bytes.

    `used` is taken by anybody, `reserved` by this process, in use or not; what is reserved and not in use counts as `free`.
    `peak` is the most that this process used at once so far.
    """

    used: int
    free: int
    total: int
    reserved: int
    peak: int


class Text(msgspec.Struct, frozen=True):
    """One text to tokenize: `prompt + text`, cut as `truncate` says if it is longer than `max_tokens`.

    Only `Encoder.chunk` reads `chunk`; it never truncates.
    """

    text: str
    prompt: str = ""
    truncate: Truncate = "error"
    chunk: Chunking | None = None


class Tokens(msgspec.Struct, frozen=True):
    """What the model runs for one text: `ids` is int32 (n,), special tokens included.

    Keys and values of the first `shared` ids were on the device when the text was tokenized, since other texts begin like this
    too: they are read, not computed. The engine looks again when the text runs, and may find more or less.
    """

    ids: npt.NDArray[np.int32]
    truncated: bool = False
    shared: int = 0
    whole: bool = False
    """All of it is computed, whatever it begins with: a trial of the device's memory needs to know what runs."""
    spans: tuple[tuple[int, int], ...] = ()
    """Ranges of `ids` that get a vector each; if empty, the whole text gets one."""

    @property
    def cost(self) -> int:
        """Tokens that are to be computed for this text: what it takes of a micro-batch's budget."""
        return len(self.ids) - self.shared

    @property
    def rows(self) -> int:
        """Number of its vectors."""
        return len(self.spans) or 1


class Chunked(msgspec.Struct, frozen=True):
    """One text cut into windows that fit the model, each with the prompt and the special tokens around it.

    In mode late, each of a window's `spans` gets a vector; in mode mean, and for a text without tokens, each window gets
    one. `pieces` has an entry for each of these vectors, in order; together the pieces cover the text without gaps.
    """

    windows: tuple[Tokens, ...]
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens computed for the text, all windows together."""
        return sum(len(window.ids) for window in self.windows)


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one vector of a chunked text stands for: characters `[start, end)`, which are `tokens` tokens."""

    start: int
    end: int
    tokens: int


class TextTooLong(msgspec.Struct, frozen=True):
    """The text has `tokens` tokens, special tokens included, and `truncate` is "error"."""

    tokens: int
    limit: int


class Failed(msgspec.Struct, frozen=True):
    """The model cannot take this text, now or later: its tokenizer raised an error or panicked on it, and on no other text of
    the call; or the text has a token that the model does not know."""

    reason: str
    """In the tokenizer's own words, which may quote the text."""
    beyond: tuple[int, int] | None = None
    """The token's id, and the rows of the embedding table, which has none for it."""


Found = Tokens | Chunked | TextTooLong | Failed
"""What became of a text at the tokenizer."""


class Pending(Protocol):
    """Vectors that the device is computing, or has computed."""

    @property
    def ready(self) -> bool:
        """Whether `result` returns at once, as it does on a CPU."""
        return False

    def result(self) -> npt.NDArray[np.float32]:
        """Wait for them: float32 (rows, hidden_size) on the host, pooled, not yet normalized. Call it once."""


class Encoder(Protocol):
    """One loaded model. `tokenize` may be called from any thread, `submit` and `encode` from one thread at a time."""

    model_version: str
    """`sha256:` and 64 hex digits over weights, tokenizer, pooling, prompts and options: equal exactly when vectors are
    comparable."""
    hidden_size: int
    """Components of a vector: the model's width, times the number of poolings, or the width of its last Dense module."""
    max_tokens: int
    """Longest input, special tokens included."""
    prompts: Mapping[str, str]
    """Prompts by name (`query`, `document`, …), from `config_sentence_transformers.json`."""
    late_chunks: bool
    """Whether spans of a text can have vectors; not where a text's vector is that of its first token."""
    default_prompt: str
    """Prepended to a text without `input_type` or instruction; `""` for most models."""
    phases: Mapping[str, float]
    """Seconds of each step of the load, in order."""
    notes: Sequence[str]
    """What an operator should know of how the directory was read, a sentence each."""
    weight_bytes: int
    """Of its device's memory that closing it gives back, at least."""
    footprint: Footprint | None = None
    """What its micro-batches' memory depends on; None where that is not known, so that it has to be tried."""

    @property
    def kernels(self) -> Mapping[str, str]:
        """Which kernels run, and why not faster ones.

        `attention`: on a GPU `flash_attn_4`, `torch_varlen` or `block_attention`, or `packed` where transformers' own layers
        call one of the first two; `torch_sdpa` on a CPU. `gate`, for Qwen3 on a GPU: `fused_epilogue`, or `separate: ` and
        the reason.
        """

    def tokenize(self, texts: Sequence[Text]) -> Sequence[Tokens | TextTooLong | Failed]:
        """Tokens of each text, in order. No text makes it raise."""

    def chunk(self, texts: Sequence[Text]) -> Sequence[Chunked | TextTooLong | Failed]:
        """Windows of each text, in order; from any thread.

        A text whose prompt takes more than half of `max_tokens` is refused, with that half as the `limit`: its windows would
        be mostly prompt.
        """

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        """Start one micro-batch, which gives `rows` vectors for each text, in order.

        On a GPU this returns while the device computes, so that the next micro-batch can be submitted; `result` may then be
        called from another thread.

        Raises, and so does `result`:
            OutOfMemory: nothing else is affected, and a smaller micro-batch may fit.
            DeviceLost: nothing more runs on this device in this process.
        """

    def encode(self, batch: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """`submit` and wait, for plain ids: float32 (len(batch), hidden_size)."""

    def memory(self) -> Memory | None:
        """The device's memory; None on a CPU, which shares its memory with everything else."""

    def close(self) -> None:
        """Release the weights' memory. The encoder must not be used afterwards."""

    def close_some(self) -> bool:
        """`close` in steps, of which all but the last one are short, so that others' micro-batches reach the device between them.
        Whether something is left for another step."""
        self.close()
        return False
