"""The model version: one hash over everything that decides what a vector is."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from embedq_consumer.engine.api import LoadOptions, ModelError
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.safety.cancellation import Cancellation
from embedq_consumer.engine.safety.files import open_regular
from embedq_consumer.engine.safety.headers import TensorSlice

__all__ = ["model_version", "read_tensors", "tensor_digests"]

Returned = TypeVar("Returned")

_READ_BYTES = 1 << 20
"""Read at once: enough that reading costs nothing next to hashing, little enough for the caches."""
# Fields that no vector depends on; everything else in these files counts, whether we know it or not.
_IDLE_CONFIG = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


def model_version(
    directory: ModelDirectory,
    options: LoadOptions,
    *,
    tokenizer: str,
    max_tokens: int,
    digests: Sequence[bytes] | None = None,
) -> str:
    """`sha256:` and 64 hex digits; the same for every copy of a directory, wherever and however it is stored.

    Weights count tensor by tensor, so that resharding keeps the version. `tokenizer` is the effective one's digest: what its
    files say only counts as far as ids depend on it. `max_tokens` counts, since it decides where a
    long text is cut. Of the options, `quantization` and `keep_bf16` count, which give other vectors from the same weights,
    and `deterministic`: it promises bits, so a cache must not answer with bits that another mode rounded.
    An adapter counts with its tensors and scales, and its base model as if it were served itself.
    `options.keep_bf16` must count from 0 on. Files are read in `options.threads` threads (hashlib releases the GIL); 8 GB
    take seconds. `digests` are those of `directory.all_tensors`, if they are known already.
    """
    total = hashlib.sha256(b"embedq model version 2")

    def add(label: str, value: bytes) -> None:
        for part in (label.encode(), value):
            total.update(len(part).to_bytes(8, "little"))
            total.update(part)

    add("config", _canonical(directory.config, _IDLE_CONFIG))
    add("tokenizer", tokenizer.encode())
    add("pooling", "+".join(directory.pooling).encode())
    add("prompts", _canonical({name: prompt for name, prompt in directory.prompts.items() if prompt}))
    add("default_prompt", directory.default_prompt.encode())
    add("max_tokens", str(max_tokens).encode())
    if options.quantization != "none":
        add("quantization", options.quantization.encode())
    if options.keep_bf16:
        add("keep_bf16", ",".join(map(str, sorted(options.keep_bf16))).encode())
    if options.deterministic:
        add("deterministic", b"1")
    if digests is None:
        digests = tensor_digests(directory.all_tensors, options.threads)
    if directory.adapter is not None:
        add("adapter", _canonical(directory.adapter.scales))
    for tensor, digest in zip(directory.all_tensors, digests, strict=True):
        add(f"tensor {tensor.name} {tensor.dtype} {list(tensor.shape)}", digest)
    for number, layer in enumerate(directory.dense):
        add(f"dense {number}", layer.activation.encode())
        parts = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
        for tensor, digest in zip(parts, tensor_digests(parts, options.threads), strict=True):
            add(f"dense {number} {tensor.name} {tensor.dtype} {list(tensor.shape)}", digest)
    return f"sha256:{total.hexdigest()}"


def _canonical(value: Mapping[str, Any], idle: frozenset[str] = frozenset()) -> bytes:
    kept = {key: item for key, item in value.items() if key not in idle}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def tensor_digests(
    tensors: tuple[TensorSlice, ...], threads: int | None, cancel: Cancellation | None = None
) -> list[bytes]:
    """SHA-256 of each tensor's bytes, in order.

    Raises:
        ModelError: a file is shorter than its header says.
        Abandoned: `cancel` was set meanwhile.
    """
    return _of_each(tensors, threads, cancel or Cancellation(), _digest)


def read_tensors(tensors: tuple[TensorSlice, ...], threads: int | None, cancel: Cancellation) -> None:
    """Read each tensor's bytes once and keep none, for what the system then holds in memory.

    Raises:
        ModelError: a file is shorter than its header says.
        Abandoned: `cancel` was set meanwhile.
    """
    _of_each(tensors, threads, cancel, lambda parts: deque(parts, maxlen=0))


def _of_each(
    tensors: tuple[TensorSlice, ...],
    threads: int | None,
    cancel: Cancellation,
    work: Callable[[Iterator[bytes]], Returned],
) -> list[Returned]:
    """What `work` makes of each tensor's bytes, in order. The files are read, not mapped: one that is cut short meanwhile would end
    the process."""
    with ExitStack() as files:
        opened = {file: files.enter_context(open_regular(file)) for file in {each.file for each in tensors}}
        with ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="read") as pool:
            return list(pool.map(lambda tensor: work(_parts(opened[tensor.file], tensor, cancel)), tensors))


def _parts(descriptor: int, tensor: TensorSlice, cancel: Cancellation) -> Iterator[bytes]:
    at = tensor.begin
    while at < tensor.end:
        cancel.check()
        part = os.pread(descriptor, min(_READ_BYTES, tensor.end - at), at)
        if not part:
            raise ModelError(f"{tensor.file}: cut short while it was read")
        yield part
        at += len(part)


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
