"""Attention on a CPU with a text's own keys alone, and filled up to a multiple of 16: `python -m benchmarks.attention_cpu`.

MiniLM's heads, some thousand tokens of one length a call, in turn; microseconds, and the largest difference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from embedq_consumer.engine.kernels.attention import SPARE_ROWS, Packing, attend_runs

HEADS, WIDTH = 12, 32
LENGTHS = (9, 13, 20, 32, 45, 63, 64, 90, 128, 150, 250)
TOKENS = 1000


@torch.inference_mode()
def compare(length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Medians of `rounds`."""
    texts = TOKENS // length
    tokens = texts * length
    rows = torch.randn(tokens + SPARE_ROWS, 3, HEADS, WIDTH).to(dtype)
    q, k, v = rows.unbind(1)
    runs = Packing.of([length] * texts, torch.device("cpu")).runs
    outs = {name: torch.empty(tokens, HEADS, WIDTH, dtype=dtype) for name in ("own", "filled")}
    spent: dict[str, list[float]] = {name: [] for name in outs}
    for _ in range(rounds):
        for name, out in outs.items():
            keys = tokens + (SPARE_ROWS if name == "filled" else 0)
            for repeat in range(2):  # the first time for the caches
                began = time.perf_counter()
                attend_runs(q[:tokens], k[:keys], v[:keys], out, runs, causal=False, scale=WIDTH**-0.5)
                if repeat:
                    spent[name].append((time.perf_counter() - began) * 1e6)
    return {
        **{name: round(statistics.median(each)) for name, each in spent.items()},
        "difference": (outs["own"] - outs["filled"]).abs().max().item(),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    table = Table(title=f"{torch.get_num_threads()} threads, µs")
    for column in ("", "keys", "its own", "filled", "ratio", "difference"):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            found = compare(length, dtype, options.rounds)
            name = str(dtype).removeprefix("torch.")
            results[f"{name}, {length} keys"] = found
            ratio = f"{found['own'] / found['filled']:.2f}"
            numbers = (str(found["own"]), str(found["filled"]), ratio, f"{found['difference']:.0e}")
            table.add_row(name, str(length), *numbers)
    Console().print(table)
    print(f"written to {write('attention_cpu', results, 'torch')}")


if __name__ == "__main__":
    main()
