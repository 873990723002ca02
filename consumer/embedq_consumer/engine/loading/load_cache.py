"""What transformers says of a model directory, cached for the next start.

A load needs transformers to compare the tokenizer, for the model's numbers, and for the hidden states of a few random tokens that
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

from embedq_consumer.engine.api import LoadOptions, ModelError
from embedq_consumer.engine.loading.model_version import model_version
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.safety.files import read_bounded

__all__ = ["LoadCache", "ModelSnapshot", "Rotary", "key_of", "libraries"]

_FORMAT: Final = "2"
"""To be raised when the meaning of a field below changes."""
_DIGEST_SIZE: Final = 32
_LIBRARIES: Final = ("torch", "transformers", "tokenizers")
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CAPACITY: Final = 16
"""Models, the most recently used: each is as large as its `tokenizer.json`, up to 20 MB."""
_MOST_BYTES: Final = 256 * 1024 * 1024
"""Of one model: a tokenizer of the largest size that is read, and the hidden states of some hundred tokens."""
_MOST_TRIED: Final = 256
"""Models of which it is noted that they passed a dry run; each is an empty file."""


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
    padding: int | None
    """As in `models.traits.Limits`."""
    tokenizer: bytes
    """The effective tokenizer as JSON, in the tokenizers library's own format."""
    split_special_tokens: bool
    tokenizer_notes: tuple[str, ...]
    """As in `EffectiveTokenizer`."""
    sequences: tuple[tuple[int, ...], ...]
    """Random tokens that a load is proved on."""
    starts: tuple[int, ...]
    """The position of the first token of each of `sequences`."""
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
            content = read_bounded(file, _MOST_BYTES)
        except ModelError:
            return None
        digest, packed = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        if hashlib.sha256(packed).digest() != digest:
            return None
        try:
            snapshot = msgspec.msgpack.decode(packed, type=ModelSnapshot)
        except msgspec.DecodeError:
            return None
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
            self._evict("*.model", _CAPACITY)

    def was_tried(self, key: str) -> bool:
        """Whether the model under `key` has passed a dry run, or a load."""
        return (self._folder / f"{key}.tried").exists()

    def note_tried(self, key: str) -> None:
        """The model under `key` has passed a dry run, or a load, and needs no other one: the key says what it follows from."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self._folder / f"{key}.tried").touch()
            self._evict("*.tried", _MOST_TRIED)

    def _evict(self, pattern: str, capacity: int) -> None:
        """Remove the least recently used files beyond the capacity."""
        files = sorted(self._folder.glob(pattern), key=lambda file: file.stat().st_mtime)
        for old in files[:-capacity]:
            old.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.model"


def key_of(directory: ModelDirectory, device: str, digests: Sequence[bytes]) -> str:
    """Hex digits of a hash over everything that a `ModelSnapshot` follows from.

    `device` names the kind of device that transformers' forward runs on; `digests` are those of
    `directory.all_tensors`.
    """
    # The directory's own limit, which the model's may lower: here it only has to be part of the hash.
    content = model_version(
        directory,
        LoadOptions(),
        tokenizer=_files_digest(directory),
        max_tokens=directory.max_seq_length or 0,
        digests=digests,
    )
    return hashlib.sha256("\n".join([_FORMAT, content, device, *libraries()]).encode()).hexdigest()


def libraries() -> list[str]:
    """The libraries that read a model directory, with their versions."""
    return [f"{name} {metadata.version(name)}" for name in _LIBRARIES]


def _files_digest(directory: ModelDirectory) -> str:
    """Hex digits of a hash over everything that the effective tokenizer is read from."""
    total = hashlib.sha256(str(directory.lower_case).encode())
    for name in _TOKENIZER_FILES:
        file = directory.checkpoint / name
        content = read_bounded(file) if file.exists() else b""
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    total.update(str((directory.checkpoint / "tokenizer.model").is_file()).encode())
    return total.hexdigest()
