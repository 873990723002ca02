"""Seconds of each step from nothing to the first vector, with and without what the start before it kept.

`python -m benchmarks.startup --shape 4B`. Each start is a process of its own. A cold one finds empty caches, a warm one
what the start before it left there: compiled code, and what transformers says of the model. All find the weights in
memory: they are read once beforehand, from the disk and again from memory, so that what reading takes is known apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import GPU_PACKAGES, write
from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import Quantization, Text, Tokens, count_gpus, default_batch_tokens, load_encoder
from embedq_consumer.engine.loading import compile_cache

ROOT = Path(__file__).parents[1]
LENGTH = 1024
"""Tokens of each text in the micro-batch that warms up."""
BLOCK = 16 * 2**20


def once(model: str, quantization: Quantization, kept: str, begin: str) -> None:
    """One start, in a process that has imported nothing heavy yet: prints what it found as JSON, on a line of its own.

    `kept` is the folder that one start leaves to the next; `begin` is when the process was asked for, by
    `time.monotonic()`, which all processes share.
    """
    steps: dict[str, float] = {}
    last = first = float(begin)

    def mark(step: str) -> None:
        nonlocal last
        now = time.monotonic()
        steps[step], last = now - last, now

    mark("python")
    budget = default_batch_tokens("auto")  # imports PyTorch as the service does
    import torch

    mark("torch")
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.zeros(1, device="cuda")
        mark("context")
    import embedq_consumer.engine.loading.loader  # noqa: F401

    mark("engine")
    encoder = load_encoder(Path(model), quantization=quantization, known_models=Path(kept) / "models")
    mark("load")
    load = steps.pop("load")
    steps |= dict(encoder.phases)
    length = min(LENGTH, encoder.max_tokens)
    encoder.submit([Tokens(np.full(length, 5, dtype=np.int32))] * (budget // length)).result()
    mark("warm up")
    [tokens] = encoder.tokenize([Text("moon")])
    assert isinstance(tokens, Tokens)
    assert np.isfinite(encoder.submit([tokens]).result()).all()
    mark("one text")
    memory = encoder.memory()
    found = {
        "engine": "fp8" if quantization == "fp8" else "bf16" if on_cuda else "float32",
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "kernels": dict(encoder.kernels),
        "steps": steps,
        "load": load,
        "ready": last - first,
        "peak_memory_gib": memory.peak / 2**30 if memory else None,
    }
    print(f"\n{json.dumps(found)}")


def start(model: Path, quantization: Quantization, kept: Path) -> dict[str, Any]:
    """Start once with everything kept below `kept`; what `once` found, and the size of what is kept there now."""
    environ: dict[str, str] = {}
    compile_cache.enable(kept, environ)
    program = "import sys; from benchmarks.startup import once; once(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), quantization, str(kept), str(time.monotonic())],
        env=os.environ | environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    return found | {"kept_mib": round(size / 2**20, 2)}


def reading(model: Path) -> dict[str, float]:
    """Seconds of reading all weights from the disk, as far as the system forgets them when asked to, and from memory."""
    files = sorted(model.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not yet on the disk cannot be forgotten
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found: dict[str, float] = {"gb": sum(file.stat().st_size for file in files) / 1e9}
    block = bytearray(BLOCK)
    for place in ("disk", "memory"):
        begin = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(block):
                    pass
        found[place] = time.perf_counter() - begin
    return found


def show(starts: list[dict[str, Any]]) -> None:
    """A row for each step, a column for each start."""
    print(f"\n{'':14}" + "".join(f"{one['engine'] + ' ' + one['start']:>16}" for one in starts))
    for name in dict.fromkeys(step for one in starts for step in one["steps"]):
        print(f"{name:14}" + "".join(f"{one['steps'].get(name, 0.0):16.2f}" for one in starts))
    print(f"{'ready':14}" + "".join(f"{one['ready']:16.2f}" for one in starts))


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4B")
    parser.add_argument(
        "--model", type=Path, help="where the checkpoint is or goes; the temporary directory otherwise"
    )
    parser.add_argument(
        "--quantizations", nargs="+", choices=["none", "fp8"], help="both on a GPU unless given"
    )
    parser.add_argument("--warm", type=int, default=2, help="warm starts after each cold one")
    parser.add_argument("--name", default="startup")
    arguments = parser.parse_args()
    model = arguments.model or Path(tempfile.gettempdir()) / f"embedq-{arguments.shape}"
    # In a process of its own: this one shall hold nothing of the device.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
        own.submit(make, model, arguments.shape).result()
    starts: list[dict[str, Any]] = []
    results = {"shape": arguments.shape, "reading_s": reading(model), "starts": starts}
    print(f"reading the weights: {results['reading_s']}", flush=True)
    for quantization in arguments.quantizations or (["none", "fp8"] if count_gpus() else ["none"]):
        with tempfile.TemporaryDirectory() as kept:
            for number in range(1 + arguments.warm):
                name = "warm" if number else "cold"
                starts.append({"start": name} | start(model, quantization, Path(kept)))
                print(f"{starts[-1]['engine']} {name}: ready after {starts[-1]['ready']:.1f} s", flush=True)
                path = write(arguments.name, results, *GPU_PACKAGES)
    show(starts)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
