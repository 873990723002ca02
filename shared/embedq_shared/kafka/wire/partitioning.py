"""Where Kafka's default partitioner puts a key: its murmur2, word by word, since aiokafka's goes byte by byte, which costs each result as
much as all the rest of its sending. The keys of a delivery are hashed together.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_SEED: Final = 0x9747B28C
_MIX: Final = 0x5BD1E995
_WORD: Final = 0xFFFFFFFF
_WORD_BYTES: Final = 4
_TOGETHER: Final = 8
"""From so many keys of a length on NumPy is quicker."""


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of one key."""
    count, rest = divmod(len(key), _WORD_BYTES)
    hashed = _SEED ^ len(key)
    for word in struct.unpack_from(f"<{count}I", key):
        mixed = word * _MIX & _WORD
        mixed = (mixed ^ mixed >> 24) * _MIX & _WORD
        hashed = hashed * _MIX & _WORD ^ mixed
    if rest:
        hashed = (hashed ^ int.from_bytes(key[-rest:], "little")) * _MIX & _WORD
    hashed = (hashed ^ hashed >> 13) * _MIX & _WORD
    return ((hashed ^ hashed >> 15) & 0x7FFFFFFF) % partitions


def partitions_of(keys: Sequence[bytes], partitions: int) -> list[int]:
    """The partition of each key."""
    if len(keys) < _TOGETHER:
        return [partition_of(key, partitions) for key in keys]
    found = [0] * len(keys)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        by_length[len(key)].append(index)
    for indices in by_length.values():
        alike = [keys[index] for index in indices]
        if len(alike) < _TOGETHER:
            its = [partition_of(key, partitions) for key in alike]
        else:
            its = ((_hashes(alike) & 0x7FFFFFFF) % partitions).tolist()
        for index, partition in zip(indices, its, strict=True):
            found[index] = partition
    return found


def _hashes(keys: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """The hash of each of these, which have one length; products of 32 bits lose what is above them, as they should."""
    length = len(keys[0])
    whole = length - length % _WORD_BYTES
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), length)
    # Row by row, the n-th word of each key.
    words = np.ascontiguousarray(rows[:, :whole]).view("<u4").T.copy()
    mix = np.uint32(_MIX)
    words *= mix
    words ^= words >> 24
    words *= mix
    hashes = np.full(len(keys), _SEED ^ length, np.uint32)
    for word in words:
        hashes *= mix
        hashes ^= word
    if whole < length:
        rest = np.zeros((len(keys), _WORD_BYTES), np.uint8)
        rest[:, : length - whole] = rows[:, whole:]
        hashes ^= rest.view("<u4")[:, 0]
        hashes *= mix
    hashes ^= hashes >> 13
    hashes *= mix
    hashes ^= hashes >> 15
    return hashes
