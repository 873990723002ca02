"""Reloads between two real models, one after the other, and what the process holds after each: `python -m tests.helpers.many_reloads ROOT COUNT POLICY`.

Prints a JSON list of bytes. A process of its own, since nothing else may take or give back memory meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import cast

import psutil

from embedq_consumer.engine import load_encoder
from embedq_shared.messages import Policy
from tests.helpers.fake_models import Bench, command


async def main(root: Path, count: int, policy: Policy) -> list[int]:
    """Bytes after each reload."""
    bench = Bench(root, {"old": [], "new": []}, load_timeout_s=600.0, stall_timeout_s=600.0)
    bench.loader.load_path = partial(load_encoder, device="cpu", threads=1, known_models=root / "known")
    await bench.model.start(None)
    held: list[int] = []
    for version in range(1, count + 1):
        await bench.follow([command(version, ("old", "new")[version % 2], policy=policy)])
        assert bench.sent[-1].state == "READY", bench.sent[-1]
        gc.collect()  # the few kilobytes of Python objects that it would take some day
        held.append(psutil.Process().memory_full_info().uss)
    await asyncio.to_thread(bench.model.close)
    return held


if __name__ == "__main__":
    found = asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), cast("Policy", sys.argv[3])))
    sys.stdout.write(json.dumps(found) + "\n")
