"""What it costs to sign a cache entry, to check and read one, and what other hashes over the same bytes would.

Microseconds an entry, in this process alone, without Redis; the least of several rounds, since a busy machine only adds.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import write
from embedq_consumer.cache import CachedVector, EntryCodec, cache_key
from embedq_consumer.engine import Text
from embedq_shared.vectors import cut_and_normalize

VERSION = "sha256:" + "a" * 64
ROUNDS = 30
ENTRIES = 500


def least(work: Callable[[], object]) -> float:
    """Microseconds of one call, in the quickest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(ENTRIES):
            work()
        best = min(best, time.perf_counter() - began)
    return round(best / ENTRIES * 1e6, 2)


def measure(dimensions: int) -> dict[str, float]:
    """Of one float32 vector."""
    secret = os.urandom(32)
    codec = EntryCodec(secret)
    key = cache_key(VERSION, Text("a text"), dimensions, "float32")
    numbers = np.random.default_rng(1).standard_normal(dimensions, np.float32)
    vector = cut_and_normalize(numbers, dimensions).tobytes()
    entry = CachedVector(tokens=9, truncated="", scale=None, vector=vector)
    value = codec.pack(key, entry)
    head = bytes(20)
    sha, blake = hmac.new(secret, digestmod="sha256"), hashlib.blake2b(key=secret, digest_size=16)

    def with_hash(keyed: Any) -> bytes:
        mac = keyed.copy()
        for part in (head, key, vector):
            mac.update(part)
        return mac.digest()[:16]  # type: ignore[no-any-return]

    return {
        "pack": least(lambda: codec.pack(key, entry)),
        "unpack": least(lambda: codec.unpack(key, value)),
        "unpack_64": round(least(lambda: codec.unpack_many([(key, value)] * 64)) / 64, 2),
        "hmac_sha256": least(lambda: with_hash(sha)),
        "blake2b": least(lambda: with_hash(blake)),
        "crc32": least(lambda: zlib.crc32(vector, zlib.crc32(head, zlib.crc32(key)))),
        "length_of_1": least(lambda: np.dot(found := np.frombuffer(vector, "<f4"), found)),
    }


def main() -> None:
    """The command."""
    results = {str(dimensions): measure(dimensions) for dimensions in (384, 1024, 2560)}
    for dimensions, found in results.items():
        print(f"{dimensions:>5}  " + "  ".join(f"{name} {value:.2f}" for name, value in found.items()))
    print(f"written to {write('cache_entries', results, 'numpy')}")


if __name__ == "__main__":
    main()
