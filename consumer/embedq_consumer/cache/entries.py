"""What Redis keeps for one vector: its key, and its value in bytes. Pure.

Two things keep a wrong vector from being served:

- The key names everything that a vector depends on, each part hashed or of a bounded form.
- The value carries a checksum over its own key and content, so that a damaged entry, or one that belongs to another
  key, is a miss.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import lru_cache
from hashlib import sha256
from typing import Final, Literal, cast

import msgspec

from embedq_consumer.engine import Text
from embedq_shared.messages import Dtype
from embedq_shared.vectors import vector_bytes

_MAGIC: Final = b"EQV1"
_HEADER: Final = struct.Struct("<4sB3xIdI")  # magic, flags, tokens, scale, checksum: 24 bytes
_BEFORE_CHECKSUM: Final = _HEADER.size - 4
_CUTS: Final[tuple[Literal["", "start", "end"], ...]] = ("", "start", "end")
_CUT_MASK: Final = 0b011
_HAS_SCALE: Final = 0b100

_VERSION: Final = re.compile(r"sha256:([0-9a-f]{64})")
_SHORT_PROMPT: Final = 4096
"""Characters. Digests of longer prompts are not kept in memory, so that senders cannot fill it with them."""


class CachedVector(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One vector in wire form: little-endian bytes of its dtype, as `vectors.quantize` makes them.

    `truncated` says which end of the text was cut, if any; the entry answers only jobs that allow that.
    """

    tokens: int
    truncated: Literal["", "start", "end"]
    scale: float | None
    vector: bytes


def cache_key(model_version: str, text: Text, dimensions: int, dtype: str) -> bytes:
    """The Redis key of one vector: all that the model sees of the input except `truncate`, which the entry holds.

    Two keys are equal exactly if version, text, prompt, window (`chunk.tokens`, of a mean over windows), dimensions and
    dtype are: each part has a fixed length or cannot hold a colon, and only a key with a window has one part more.

    Raises:
        ValueError: `model_version` is not `sha256:` and 64 hex digits, or the text holds a lone surrogate.
    """
    prompt = text.prompt
    frame = _frame if len(prompt) <= _SHORT_PROMPT else _frame.__wrapped__
    head, tail = frame(
        model_version, prompt, dimensions, dtype, None if text.chunk is None else text.chunk.tokens
    )
    return head + sha256(text.text.encode()).hexdigest().encode() + tail


@lru_cache(maxsize=512)
def _frame(
    model_version: str, prompt: str, dimensions: int, dtype: str, window: int | None
) -> tuple[bytes, bytes]:
    version = _VERSION.fullmatch(model_version)
    if version is None:
        raise ValueError("model_version: expected sha256: and 64 hex digits")
    mean = "" if window is None else f":mean{window}"
    tail = f":{sha256(prompt.encode()).hexdigest()}{mean}:{dimensions}:{dtype}"
    return f"embedq:v1:{version[1]}:".encode(), tail.encode()


def pack(key: bytes, entry: CachedVector) -> bytes:
    """The value that Redis keeps for this key: 24 bytes of header, then the vector."""
    flags = _CUTS.index(entry.truncated) | (_HAS_SCALE if entry.scale is not None else 0)
    header = _HEADER.pack(_MAGIC, flags, entry.tokens, entry.scale or 0.0, 0)[:_BEFORE_CHECKSUM]
    return b"".join((header, _checksum(key, header, entry.vector).to_bytes(4, "little"), entry.vector))


def unpack(key: bytes, value: bytes) -> CachedVector | None:
    """What `pack` made for this very key, or None if `value` is anything else."""
    if len(value) != _HEADER.size + entry_bytes(key):
        return None
    magic, flags, tokens, scale, checksum = _HEADER.unpack_from(value)
    vector = value[_HEADER.size :]
    cut = flags & _CUT_MASK
    if (
        magic != _MAGIC
        or cut >= len(_CUTS)
        or flags & ~(_CUT_MASK | _HAS_SCALE)
        or checksum != _checksum(key, value[:_BEFORE_CHECKSUM], vector)
    ):
        return None
    return CachedVector(
        tokens=tokens,
        truncated=_CUTS[cut],
        scale=scale if flags & _HAS_SCALE else None,
        vector=vector,
    )


def _checksum(key: bytes, header: bytes, vector: bytes) -> int:
    return zlib.crc32(vector, zlib.crc32(header, zlib.crc32(key)))


def entry_bytes(key: bytes) -> int:
    """Bytes of the vector that a key of `cache_key` asks for."""
    _, dimensions, dtype = key.rsplit(b":", 2)
    return _wire_bytes(dimensions, dtype)


@lru_cache(maxsize=4096)
def _wire_bytes(dimensions: bytes, dtype: bytes) -> int:
    return vector_bytes(int(dimensions), cast(Dtype, dtype.decode()))
