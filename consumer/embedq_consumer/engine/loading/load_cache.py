"""What transformers says of a model directory, cached for the next start.

A load needs transformers for the tokenizer, for the model's numbers, and for the hidden states of a few random tokens that
our forward is proved against. All of it follows from the directory's bytes, the versions of a few libraries and the kind of
device, so it is cached under a hash of those. A later load is proved against the same hidden states without importing
transformers, which takes longer than reading most weights.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from embedq_consumer.engine.api import LoadOptions
from embedq_consumer.engine.loading.model_version import model_version
from embedq_consumer.engine.model_directory import ModelDirectory

__all__ = ["LoadCache", "ModelSnapshot", "Rotary", "key_of"]

_FORMAT: Final = "1"
"""To be raised when the meaning of a field below changes."""
_DIGEST_SIZE: Final = 32
_LIBRARIES: Final = ("torch", "transformers", "tokenizers")
_CAPACITY: Final = 16
"""Models, the most recently used: each is as large as its `tokenizer.json`, up to 20 MB."""


class Rotary(msgspec.Struct, frozen=True):
    """Rotary positions: a float32 frequency for each pair of channels, and the scale of the angles' cosines and sines."""

    rope_type: str
    frequencies: tuple[float, ...]
    attention_scaling: float


class ModelSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One model directory as transformers understands it, without its weights."""

    architecture: str
    """transformers' class, such as `Qwen3Model`."""
    config: dict[str, Any]
    """All fields, including those that `config.json` leaves to their defaults."""
    tensors: dict[str, str]
    """The checkpoint's name of each parameter that the forward needs."""
    rotary: Rotary | None
    last_norm_eps: float | None
    """Of an RMS norm after the last layer; None without one."""
    max_tokens: int
    position_offset: int
    tokenizer: str
    """The whole tokenizer as JSON, in the tokenizers library's own format."""
    sequences: tuple[tuple[int, ...], ...]
    """Random tokens that a load is proved on."""
    expected: bytes
    """Their hidden states after the last layer by transformers' own forward, each alone: float32 (tokens, hidden)."""


class LoadCache:
    """A folder of `ModelSnapshot`s. A file that cannot be read or written counts as a miss: that load takes longer.

    A file is the SHA-256 of the rest, then the snapshot as MessagePack.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> ModelSnapshot | None:
        """The snapshot under `key`; None if there is none, or it is damaged."""
        file = self._file(key)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        digest, packed = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        if hashlib.sha256(packed).digest() != digest:
            return None
        snapshot = msgspec.msgpack.decode(packed, type=ModelSnapshot)
        with suppress(OSError):
            os.utime(file)  # the most recently used now
        return snapshot

    def put(self, key: str, snapshot: ModelSnapshot) -> None:
        """Store `snapshot` under `key`, and evict the least recently used ones beyond the capacity."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    packed = msgspec.msgpack.encode(snapshot)
                    file.write(hashlib.sha256(packed).digest() + packed)
                    file.flush()
                    os.replace(file.name, self._file(key))  # atomically: another process may load it now
                except BaseException:
                    os.unlink(file.name)
                    raise
            files = sorted(self._folder.glob("*.model"), key=lambda file: file.stat().st_mtime)
            for old in files[:-_CAPACITY]:
                old.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.model"


def key_of(directory: ModelDirectory, device: str, digests: Sequence[bytes]) -> str:
    """Hex digits of a hash over everything that a `ModelSnapshot` follows from.

    `device` names the kind of device that transformers' forward runs on; `digests` are those of
    `directory.tensors`.
    """
    # The directory's own limit, which the model's may lower: here it only has to be part of the hash.
    content = model_version(
        directory, LoadOptions(), max_tokens=directory.max_seq_length or 0, digests=digests
    )
    versions = [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    return hashlib.sha256("\n".join([_FORMAT, content, device, *versions]).encode()).hexdigest()
