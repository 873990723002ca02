"""What Redis keeps for one vector: its key, and its value in bytes. Pure.

Three things keep a wrong vector from being served, whoever can write to Redis:

- The key names everything that a vector depends on, each part hashed or of a bounded form.
- The value carries a keyed hash over its own key and content. Without the secret nobody makes one, and an entry that is
  copied to another key fails.
- A vector is checked when it is read: finite, and of length 1 as far as its dtype can tell.
"""

from __future__ import annotations

import hmac
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Final, Literal, cast

import msgspec
import numpy as np

from embedq_consumer.engine import Text
from embedq_shared.messages import Dtype
from embedq_shared.vectors import NUMPY, vector_bytes

_MAGIC: Final = b"EQV2"
_HEADER: Final = struct.Struct("<4sBxHId")  # magic, flags, bytes of the key, tokens, scale: 20 bytes
_TOGETHER: Final = 4
"""From so many vectors on it is quicker to look at them together."""
_TAG_BYTES: Final = 16
"""128 bits of HMAC-SHA256: nobody guesses one, and nobody can try many."""
OVERHEAD_BYTES: Final = _HEADER.size + _TAG_BYTES
"""Bytes of a value besides its vector."""
_CUTS: Final[tuple[Literal["", "start", "end"], ...]] = ("", "start", "end")
_CUT_MASK: Final = 0b011
_HAS_SCALE: Final = 0b100

KEY_PREFIX: Final = "embedq:v2:"
"""Of every key; what an access list in Redis must allow. The 2 is the form of key and value."""
_VERSION: Final = re.compile(r"sha256:([0-9a-f]{64})")
_SHORT_PROMPT: Final = 4096
"""Characters. Digests of longer prompts are not kept in memory, so that senders cannot fill it with them."""

_ROUNDING: Final = {"float32": 1e-3, "float16": 4e-3, "int8": 1e-3}
"""How far the squared length of a stored vector may be from 1: many times what rounding does to each component (2^-24
and 2^-11 of it). What int8 adds is computed from its scale."""

_LARGEST_SCALE: Final = 1.001 / 127
"""No component of a vector of length 1 is over 1, and the largest one is stored as 127."""

Refused = Literal["size", "format", "signature", "values"]
"""Why a value is not believed: a length that its key does not have, other fields, a wrong keyed hash, or a vector that
no model of ours gives."""


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
    return f"{KEY_PREFIX}{version[1]}:".encode(), tail.encode()


class EntryCodec:
    """Entries to the bytes that Redis keeps, and back. `secret` must be the same in every replica that shares a Redis."""

    def __init__(self, secret: bytes) -> None:
        self._mac = hmac.new(secret, digestmod=sha256)

    def pack(self, key: bytes, entry: CachedVector) -> bytes:
        """The value that Redis keeps for this key: 20 bytes of header, 16 of keyed hash, then the vector."""
        flags = _CUTS.index(entry.truncated) | (_HAS_SCALE if entry.scale is not None else 0)
        header = _HEADER.pack(_MAGIC, flags, len(key), entry.tokens, entry.scale or 0.0)
        return b"".join((header, self._tag(header, key, entry.vector), entry.vector))

    def unpack(self, key: bytes, value: bytes) -> CachedVector | Refused:
        """What `pack` made for this very key with this secret, or why `value` is not that."""
        [found] = self.unpack_many([(key, value)])
        return found

    def unpack_many(self, found: Sequence[tuple[bytes, bytes]]) -> list[CachedVector | Refused]:
        """The same for each key and value of a look-up."""
        entries = [self._signed(key, value) for key, value in found]
        for index in _not_units([key for key, _ in found], entries):
            entries[index] = "values"
        return entries

    def _signed(self, key: bytes, value: bytes) -> CachedVector | Refused:
        """What was signed for this key, whatever its numbers are."""
        if len(value) != OVERHEAD_BYTES + entry_bytes(key):
            return "size"
        header, tag, vector = (
            value[: _HEADER.size],
            value[_HEADER.size : OVERHEAD_BYTES],
            value[OVERHEAD_BYTES:],
        )
        magic, flags, _, tokens, scale = _HEADER.unpack(header)
        cut = flags & _CUT_MASK
        if magic != _MAGIC or cut >= len(_CUTS) or flags & ~(_CUT_MASK | _HAS_SCALE):
            return "format"
        if not hmac.compare_digest(tag, self._tag(header, key, vector)):
            return "signature"
        kept_scale = scale if flags & _HAS_SCALE else None
        return CachedVector(tokens=tokens, truncated=_CUTS[cut], scale=kept_scale, vector=vector)

    def _tag(self, header: bytes, key: bytes, vector: bytes) -> bytes:
        """Of what the header, which holds the key's length, makes a string that can be read in one way only."""
        mac = self._mac.copy()
        mac.update(b"".join((header, key, vector)))
        return mac.digest()[:_TAG_BYTES]


def _not_units(keys: Sequence[bytes], entries: Sequence[CachedVector | Refused]) -> list[int]:
    """Which of these entries hold no vector of length 1. Those of float32, as most are, are looked at together."""
    wrong: list[int] = []
    alike: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    for index, (key, entry) in enumerate(zip(keys, entries, strict=True)):
        if isinstance(entry, str):
            continue
        vector, dtype = entry.vector, key[key.rindex(b":") + 1 :].decode()
        if dtype == "float32" and entry.scale is None:
            alike[len(vector)].append((index, vector))
        elif not _is_unit(vector, dtype, entry.scale):
            wrong.append(index)
    for its in alike.values():
        if len(its) < _TOGETHER:
            wrong += [index for index, vector in its if not _is_unit(vector, "float32", None)]
            continue
        numbers = np.frombuffer(b"".join([vector for _, vector in its]), NUMPY["float32"])
        rows = numbers.reshape(len(its), -1)
        # `einsum`, like `vdot`, does not warn of numbers whose squares are infinite.
        units = np.abs(np.einsum("ij,ij->i", rows, rows) - 1.0) <= _ROUNDING["float32"]
        wrong += [index for (index, _), unit in zip(its, units.tolist(), strict=True) if not unit]
    return wrong


def _is_unit(vector: bytes, dtype: str, scale: float | None) -> bool:
    """Whether these bytes can be a vector of length 1; NaN and infinity never are. Bits alone have no length to check."""
    if dtype == "binary":
        return scale is None
    stored = np.frombuffer(vector, NUMPY[dtype])
    allowed = _ROUNDING[dtype]
    if dtype == "int8":
        if scale is None or not 0 < scale < _LARGEST_SCALE:
            return False
        # Rounding moves each component by half a step at most, and so the length by half a step times √dimensions.
        off = scale / 2 * len(stored) ** 0.5
        allowed += 2 * off + off * off
    elif scale is not None:
        return False
    # float32, since NumPy sums bytes in bytes. What is too large for it becomes infinity, which is not
    # near 1, and `vdot`, unlike `dot`, does not warn of it.
    numbers = stored if dtype == "float32" else stored.astype(np.float32)
    squared = float(np.vdot(numbers, numbers)) * (scale * scale if scale is not None else 1.0)
    return abs(squared - 1.0) <= allowed


def entry_bytes(key: bytes) -> int:
    """Bytes of the vector that a key of `cache_key` asks for."""
    _, dimensions, dtype = key.rsplit(b":", 2)
    return _wire_bytes(dimensions, dtype)


@lru_cache(maxsize=4096)
def _wire_bytes(dimensions: bytes, dtype: bytes) -> int:
    return vector_bytes(int(dimensions), cast(Dtype, dtype.decode()))
