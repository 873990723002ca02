"""A short text's forward on a CPU, by each way that there is: `python -m benchmarks.few_rows`.

One encoder each: with ONNX Runtime (where it is installed), with weights that oneDNN laid out once, and with PyTorch's plain
products. They run in turns. Processor time of one thread is what a busy machine disturbs least; wall time is with all threads.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from benchmarks.pipeline import minilm
from embedq_consumer.engine import load_encoder

WAYS: Final = ("onnxruntime", "packed", "plain")
TOKENS: Final = (8, 16, 32, 64, 128)
_KERNELS: Final = "embedq_consumer.engine.kernels"


def measure(model: Path, threads: int | None, rounds: int) -> dict[str, Any]:
    """Of one text of each length: for each way, median and least milliseconds of processor and wall time."""
    encoders = {way: encoder for way in WAYS if (encoder := _load(way, model, threads)) is not None}
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for tokens in TOKENS:
        text = [random.integers(1000, 20_000, tokens).astype(np.int32)]
        expected = encoders["plain"].encode(text)
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in encoders}
        for _ in range(rounds):
            for way, encoder in encoders.items():
                encoder.encode(text)  # the other ways' weights are in the caches
                processor, wall = time.process_time_ns(), time.perf_counter_ns()
                encoder.encode(text)
                spent[way].append(
                    ((time.process_time_ns() - processor) / 1e6, (time.perf_counter_ns() - wall) / 1e6)
                )
        found[str(tokens)] = {
            way: {
                "processor_ms": _spread([each[0] for each in its]),
                "wall_ms": _spread([each[1] for each in its]),
                "largest_difference": float(
                    np.abs(_unit(encoders[way].encode(text)) - _unit(expected)).max()
                ),
            }
            for way, its in spent.items()
        }
    return found


def _load(way: str, model: Path, threads: int | None) -> Any:
    """An encoder whose few rows run this way; None where it cannot."""
    with ExitStack() as patched:
        if way != "onnxruntime":
            patched.enter_context(patch(f"{_KERNELS}.onnx_rows.OnnxBert.__init__", side_effect=ImportError))
        if way == "plain":
            patched.enter_context(patch(f"{_KERNELS}.cpu_products.PACKED_BYTES", 0))
        encoder = load_encoder(model, device="cpu", threads=threads)
    return encoder if encoder.kernels.get("few_rows") == way else None


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "least": round(min(values), 2)}


def _unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def show(name: str, found: dict[str, Any], kind: str) -> None:
    """Print the table."""
    table = Table(title=f"{name}, median and least ms")
    ways = list(next(iter(found.values())))
    for column in ("tokens", *ways):
        table.add_column(column, justify="right")
    for tokens, its in found.items():
        table.add_row(
            tokens, *(f"{its[way][kind]['median']:.2f} {its[way][kind]['least']:.2f}" for way in ways)
        )
    Console().print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; default: MiniLM")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = arguments.model or minilm()
    if arguments.threads is not None:
        threads = arguments.threads or None
        sys.stdout.buffer.write(msgspec.json.encode(measure(model, threads, arguments.rounds)))
        return
    results: dict[str, Any] = {"model": model.parent.name, "rounds": arguments.rounds}
    for name, threads in (("one thread", 1), ("all threads", 0)):
        command = [sys.executable, "-m", "benchmarks.few_rows", "--threads", str(threads)]
        command += ["--model", str(model), "--rounds", str(arguments.rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        results[name] = msgspec.json.decode(done.stdout)
    show("one thread, processor time", results["one thread"], "processor_ms")
    show("all threads, wall time", results["all threads"], "wall_ms")
    print(f"written to {write('few_rows', results, 'embedq', 'torch', 'onnxruntime', 'numpy')}")


if __name__ == "__main__":
    main()
