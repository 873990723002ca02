"""Reloads between two real models, one after the other, texts for each, and what the process holds then: `python -m tests.helpers.many_reloads ROOT COUNT POLICY`.

Prints JSON, a list of `Held`. A process of its own, since nothing else may take or give back memory meanwhile.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from functools import partial
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import cast

import msgspec

from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_shared.messages import Policy
from tests.helpers.fake_models import Bench, command


class Held(msgspec.Struct, frozen=True):
    """Bytes after a reload."""

    anonymous: int
    """Pages that are no file's: what is in use, and what the allocator keeps of what was freed. Pages of libraries would not do: whose
    they are alone changes with what other processes run."""
    in_use: int | None
    """What malloc has handed out; None where the C library does not say."""


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def held() -> Held:
    """What the process holds now."""
    gc.collect()  # the few kilobytes of Python objects that it would take some day
    in_use = None
    if (ask := getattr(ctypes.CDLL(None), "mallinfo2", None)) is not None:
        ask.restype = _MallInfo
        found = ask()
        in_use = found.uordblks + found.hblkhd
    return Held(anonymous_bytes(), in_use)


def anonymous_bytes() -> int:
    """What this process holds that lies in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def many_words(count: int = 200) -> list[str]:
    """Texts of a hundred words each, all of them different."""
    random = Random(0)
    return [
        " ".join("".join(random.choices(ascii_lowercase, k=random.randint(4, 12))) for _ in range(100))
        for _ in range(count)
    ]


async def main(root: Path, count: int, policy: Policy) -> list[Held]:
    """What is held after each reload."""
    bench = Bench(root, {"old": [], "new": []}, load_timeout_s=600.0, stall_timeout_s=600.0)
    bench.loader.load_path = partial(load_encoder, device="cpu", threads=1, known_models=root / "known")
    await bench.model.start(None)
    found: list[Held] = []
    texts = many_words()
    # In this thread: else it is chance which of the library's has remembered which words.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for version in range(1, count + 1):
        await bench.follow([command(version, ("old", "new")[version % 2], policy=policy)])
        assert bench.sent[-1].state == "READY", bench.sent[-1]
        encoder = bench.model.slot.loaded.encoder
        tokens = encoder.tokenize([Text(words, truncate="end") for words in texts])
        await bench.model.slot.encode(encoder, [each for each in tokens[:20] if isinstance(each, Tokens)])
        found.append(held())
    await asyncio.to_thread(bench.model.close)
    return found


if __name__ == "__main__":
    each = asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), cast("Policy", sys.argv[3])))
    sys.stdout.buffer.write(msgspec.json.encode(each) + b"\n")
