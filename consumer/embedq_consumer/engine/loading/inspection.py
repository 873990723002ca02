"""What speaks against a model directory, and what it will take, before a weight is read and before anything is given up for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from embedq_consumer.engine.api import Footprint, Inspection, LoadOptions, ModelError, Quantization
from embedq_consumer.engine.loading.dry_run import dry_run
from embedq_consumer.engine.loading.load_cache import LoadCache, libraries
from embedq_consumer.engine.loading.memory_check import (
    DeviceMemory,
    MemoryEstimate,
    estimate_of,
    host_memory,
)
from embedq_consumer.engine.loading.model_version import read_tensors
from embedq_consumer.engine.model_directory import ModelDirectory, read_directory
from embedq_consumer.engine.models.registry import refuse
from embedq_consumer.engine.pooling import pooling_of
from embedq_consumer.engine.safety.cancellation import Cancellation

__all__ = ["available", "device_named", "footprint_of", "inspect", "needed", "read_ahead"]

_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")
"""How `config.json` names the width of a hidden state."""
_NAMES = frozenset(
    {"_commit_hash", "_name_or_path", "dtype", "name_or_path", "torch_dtype", "transformers_version"}
)
"""What in `config.json` changes nothing of how a model runs here; models run in the device's dtype, whatever it says."""


def inspect(path: Path, options: LoadOptions, cancel: Cancellation) -> Inspection:
    """Check the directory's files, and let a process of its own try its tokenizer and the shapes and names of its weights.

    Raises:
        ModelError: the directory or the device cannot be used.
        Abandoned: `cancel` was set meanwhile.
    """
    target = device_named(options.device)
    directory = read_directory(path, options.root)
    estimate, memory = needed(directory, target, options.quantization), available(target)
    refuse(options.quantization, target)
    cancel.check()
    if options.dry_run_s is not None:
        _try(path, options, options.dry_run_s, cancel)
    return Inspection(
        needed=estimate.total,
        free=memory.free,
        total=memory.total,
        device=memory.device,
        hidden_size=_hidden_size(directory),
    )


def read_ahead(path: Path, options: LoadOptions, cancel: Cancellation) -> bool:
    """Have the system hold the weights' files in memory, so that the load that follows does not wait for the disk. Whether there was
    room for them: they would push each other out otherwise, and be read twice.

    Raises:
        ModelError: a file is not what it was, or is cut short.
        Abandoned: `cancel` was set meanwhile.
    """
    tensors = read_directory(path, options.root).all_tensors
    if sum(tensor.end - tensor.begin for tensor in tensors) > host_memory().free:
        return False
    read_tensors(tensors, options.threads, cancel)
    return True


def _try(path: Path, options: LoadOptions, within_s: float, cancel: Cancellation) -> None:
    """A dry run, unless these very files have passed one: a command that goes back to a model must not pay for it again."""
    cache = None if options.known_models is None else LoadCache(options.known_models)
    key = _signature(path)
    if cache is not None and cache.was_tried(key):
        return
    dry_run(path, options.root, within_s=within_s, cancel=cancel)
    if cache is not None:
        cache.note_tried(key)


def _signature(path: Path) -> str:
    """Hex digits of a hash over the names, sizes and times of all files. A load goes by their content; this need not read it."""
    total = hashlib.sha256("\n".join([str(path), *libraries()]).encode())
    for file in sorted(path.rglob("*")):
        with suppress(OSError):  # a link that leads nowhere
            state = file.stat()
            total.update(
                f"{file} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n".encode()
            )
    return total.hexdigest()


def needed(directory: ModelDirectory, target: torch.device, quantization: Quantization) -> MemoryEstimate:
    """What the model takes on its device. On a CPU only weights count: the rest is small beside them, and given back."""
    on_cuda = target.type == "cuda"
    estimate = estimate_of(
        directory.tensors,
        directory.config,
        dtype="bf16" if on_cuda else "float32",
        quantization=quantization,
    )
    return estimate if on_cuda else msgspec.structs.replace(estimate, activations=0)


def footprint_of(
    directory: ModelDirectory,
    device: str,
    options: LoadOptions,
    *,
    dtype: str,
    max_tokens: int,
    kernels: Mapping[str, str],
) -> Footprint:
    """What the memory of this model's micro-batches depends on. `options.keep_bf16` counts from 0 on."""
    shape = {name: value for name, value in directory.config.items() if name not in _NAMES}
    return Footprint(
        device=device,
        architecture=msgspec.json.encode(shape, order="sorted").decode(),
        dtype=dtype,
        quantization=options.quantization,
        keep_bf16=tuple(options.keep_bf16),
        deterministic=options.deterministic,
        kernels=tuple(sorted(kernels.items())),
        pooling=directory.pooling,
        dense=tuple((layer.width_in, layer.width_out) for layer in directory.dense),
        max_tokens=max_tokens,
    )


def available(target: torch.device) -> DeviceMemory:
    """The device's memory; what PyTorch holds without using it is free, too."""
    if target.type != "cuda":
        return host_memory()
    free, total = torch.cuda.mem_get_info(target)
    free += torch.cuda.memory_reserved(target) - torch.cuda.memory_allocated(target)
    return DeviceMemory(device=str(target), free=free, total=total)


def device_named(name: str) -> torch.device:
    """The device of a setting.

    Raises:
        ModelError: it is not one of this machine's.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _hidden_size(directory: ModelDirectory) -> int | None:
    """Components of a vector; None where the configuration names them in a way of its own, which the load will know."""
    if directory.dense:
        return directory.dense[-1].width_out
    nested = directory.config.get("text_config")
    for config in (directory.config, nested if isinstance(nested, dict) else {}):
        for name in _WIDTHS:
            if isinstance(width := config.get(name), int):
                return pooling_of(directory.pooling).width(width)
    return None
