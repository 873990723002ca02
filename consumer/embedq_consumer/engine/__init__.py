"""The engine turns a model directory into an encoder, and token ids into vectors.

It is the only room that imports torch, transformers and tokenizers. Other rooms use what is handed on here: `load_encoder`,
the `Encoder` that it returns, and the values of `api`. Importing this module imports none of the heavy libraries;
`load_encoder` does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Unpack

import msgspec

from embedq_consumer.engine.api import (
    Chunked,
    DeviceLost,
    Encoder,
    Failed,
    Footprint,
    Found,
    Inspection,
    LoadArguments,
    LoadOptions,
    Memory,
    ModelError,
    OutOfMemory,
    Pending,
    Piece,
    Quantization,
    Text,
    TextTooLong,
    Tokens,
    Truncate,
    cpu_tokens,
)
from embedq_consumer.engine.safety.cancellation import Abandoned, Cancellation
from embedq_consumer.engine.safety.foreign import OFFLINE

__all__ = [
    "Abandoned",
    "Cancellation",
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
    "count_gpus",
    "cpu_tokens",
    "default_batch_tokens",
    "inspect_model",
    "is_cpu",
    "load_encoder",
    "read_ahead",
]


_COUNT_S = 180.0
"""Importing PyTorch takes seconds, and the first look at eight GPUs some more."""


def count_gpus() -> int:
    """CUDA devices that this machine's processes may use. Asks a child process, so that this one loads no PyTorch.

    Raises:
        DeviceLost: the driver does not answer.
    """
    import subprocess  # which the help of a command that names this room would wait for

    try:
        asked = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=_COUNT_S,
        )
    except subprocess.TimeoutExpired:
        raise DeviceLost(f"the CUDA driver did not answer within {_COUNT_S:g} s") from None
    return int(asked.stdout)


def default_batch_tokens(device: str, threads: int | None = None, quantization: Quantization = "none") -> int:
    """A token budget that keeps the device busy without delaying the texts that wait; `threads` as in `LoadOptions`.

    On two cores MiniLM is no slower with 512 or 1,024 tokens at a time than with 2,048 (813, 823 and 768 tokens a second), and whoever
    waits beside another client's flood waits for one or two micro-batches.
    """
    return cpu_tokens(threads or _threads(), quantization) if is_cpu(device) else 16_384


def _threads() -> int:
    """Those that PyTorch has by itself: one for each core that this process may use, or as few as OpenMP is told to have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(cores, int(told)) if told.isdecimal() else cores


def is_cpu(device: str) -> bool:
    """Whether models run on the CPU, where `device` is what `LoadOptions` say."""
    if device == "auto":
        _before_torch()
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device == "cpu"


def inspect_model(
    path: Path, options: LoadOptions | None = None, cancel: Cancellation | None = None
) -> Inspection:
    """Check a model directory, as far as that goes without reading its weights; `load_encoder` with the same options is next.

    Raises:
        ModelError: the directory is incomplete, or asks for something that embedq does not run.
        Abandoned: `cancel` was set meanwhile.
    """
    _before_torch()
    os.environ.update(OFFLINE)
    from embedq_consumer.engine.loading.inspection import inspect

    return inspect(path, options or LoadOptions(), cancel or Cancellation())


def read_ahead(path: Path, options: LoadOptions | None = None, cancel: Cancellation | None = None) -> bool:
    """Read a model's files once, so that `load_encoder` finds them in memory; false where there is no room for that.

    Raises:
        ModelError: the directory is not complete any more.
        Abandoned: `cancel` was set meanwhile.
    """
    _before_torch()
    from embedq_consumer.engine.loading import inspection

    return inspection.read_ahead(path, options or LoadOptions(), cancel or Cancellation())


def load_encoder(
    path: Path,
    options: LoadOptions | None = None,
    cancel: Cancellation | None = None,
    **changes: Unpack[LoadArguments],
) -> Encoder:
    """Load a directory in Hugging Face / sentence-transformers layout, as `options` say, with `changes` to them.

    Raises:
        ModelError: the directory is incomplete, or asks for something that embedq does not run.
        Abandoned: `cancel` was set meanwhile; what was loaded is freed.
    """
    _before_torch()
    os.environ.update(OFFLINE)
    from embedq_consumer.engine.loading.loader import load

    return load(path, msgspec.structs.replace(options or LoadOptions(), **changes), cancel)


def _before_torch() -> None:
    """Set what PyTorch's OpenMP reads when it loads; must run before anything imports torch.

    By default its threads spin 300,000 times while they wait for each other. On cores shared with the event loop and a
    broker that is most of what they do, and batches take up to ten times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
