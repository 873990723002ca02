"""The engine on a GPU against its ceiling: tokens a second, the sustained rate of its matrix products alone, one query.

`python -m benchmarks.engine --shape 4B`. Texts go the service's way: its queue, its scheduling, its two steps to the
device, from ids on the host to float32 vectors on the host (`benchmarks.scheduled`). Every engine's vectors are checked
while it is timed: shape, finite, and close to those of transformers' own forward of each text alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.corpora import LENGTHS, corpus
from benchmarks.machine import GPU_PACKAGES, write
from benchmarks.peers import has_vllm, padded, reference, unit, vllm
from benchmarks.qwen3_shapes import SHAPES, make
from benchmarks.scheduled import scheduled
from embedq_consumer.engine import Text, Tokens, default_batch_tokens, load_encoder
from embedq_consumer.engine.kernels.fp8 import linear
from embedq_consumer.engine.kernels.fused_ops import per_token_quant_fp8
from embedq_consumer.engine.models import qwen3_cuda
from embedq_consumer.engine.row_sizes import best_fit

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

OURS = ("bf16", "bf16-separate", "fp8")
"""`bf16-separate` is bf16 without the product that gates in its epilogue."""
LEAST_COSINE = {
    "bf16": 0.99,
    "bf16-separate": 0.99,
    "fp8": 0.9,
    "transformers": 0.99,
    "vllm": 0.99,
    "vllm-fp8": 0.9,
}
"""Against transformers in bf16, on random weights, which amplify rounding as trained ones do not."""
CEILING_TOKENS = 8192
CEILING_SECONDS = 6.0
SAMPLE = 40
"""Texts of each load whose vectors are compared."""


def ceiling(encoder: Any, seconds: float = CEILING_SECONDS) -> dict[str, float]:
    """Tokens a second of the engine's own weights' products alone, in a CUDA graph, once the card has settled."""
    layers = encoder._forward._layers
    with torch.inference_mode():
        rows: dict[tuple[int, bool], Any] = {}

        def rows_for(weight: Any) -> Any:
            quantized = isinstance(weight, tuple)
            width = (weight[0] if quantized else weight).shape[1]
            if (width, quantized) not in rows:
                x = torch.randn(CEILING_TOKENS, width, device="cuda", dtype=torch.bfloat16)
                rows[width, quantized] = per_token_quant_fp8(x) if quantized else x
            return rows[width, quantized]

        def products() -> None:
            for layer in layers:
                for weight in (layer.qkv, layer.o_proj, layer.gate_up, layer.down):
                    linear(rows_for(weight), weight)

        products()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products()
        rates = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            rates.append(5 * CEILING_TOKENS / (time.perf_counter() - start))
    last = rates[len(rates) * 2 // 3 :]
    return {"first": rates[0], "sustained": sum(last) / len(last)}


def latency(encoder: Any, tokens: int, times: int = 300) -> dict[str, float]:
    """Milliseconds from one text to its unit vector, tokenizing and the way back included."""
    text = "moon" + " moon" * tokens
    while True:
        found = encoder.tokenize([Text(text)])[0]
        assert isinstance(found, Tokens)
        if len(found.ids) <= tokens:
            break
        text = text[: -max(1, len(text) // 50)]
    assert len(found.ids) > tokens // 2
    taken = []
    for turn in range(times + 20):
        begin = time.perf_counter()
        found = encoder.tokenize([Text(text)])[0]
        vector = encoder.submit([found]).result()[0]
        vector = vector / np.linalg.norm(vector)
        if turn >= 20:
            taken.append((time.perf_counter() - begin) * 1e3)
    return {
        "tokens": len(found.ids),
        "p50": float(np.percentile(taken, 50)),
        "p99": float(np.percentile(taken, 99)),
    }


def profile(encoder: Any, tokens: int) -> list[dict[str, float | str]]:
    """Microseconds on the device by kernel, of one row of `tokens`, log-normal lengths."""
    texts = [text.ids for text in corpus("log-normal", 600)]
    batch = [np.full(tokens, 5, dtype=np.int32)]
    if tokens >= 4096:
        parts = best_fit([len(ids) for ids in texts], tokens, 512)
        batch = [texts[i] for i in parts[len(parts) // 2]]
    for _ in range(20):
        encoder.encode(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            encoder.encode(batch)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            spent[event.name[:80]] += event.device_time / 3
            calls[event.name[:80]] += 1
    rows = sorted(spent.items(), key=lambda item: -item[1])[:14]
    total = sum(spent.values())
    return [{"kernel": "total", "us": total, "share": 1.0}] + [
        {"kernel": name, "us": us, "share": us / total, "calls": calls[name] // 3} for name, us in rows
    ]


class Load:
    """One corpus: its texts, and reference vectors of a sample of them."""

    def __init__(self, path: Path, name: str, vocabulary: int) -> None:
        self.name = name
        self.texts = corpus(name, vocabulary)
        self.tokens = sum(len(text.ids) for text in self.texts)
        self.sample = list(range(0, len(self.texts), max(1, len(self.texts) // SAMPLE)))
        self.wanted = reference(path, [self.texts[i].ids for i in self.sample])

    def check(self, vectors: Vectors, engine: str) -> dict[str, float]:
        """The vectors are what they should be, as far as the load's first `len(vectors)` texts go."""
        assert vectors.dtype == np.float32
        assert vectors.shape[1] == self.wanted.shape[1]
        assert np.isfinite(vectors).all(), "not finite"
        here = [n for n, i in enumerate(self.sample) if i < len(vectors)]
        found = unit(vectors[[self.sample[n] for n in here]])
        cosines = (found * self.wanted[here]).sum(axis=1)
        assert cosines.min() >= LEAST_COSINE[engine], cosines
        return {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}


def measure_peer(path: Path, load: Load, engine: str, most: int) -> dict[str, float]:
    """Tokens a second of another engine, of at most `most` texts."""
    ids = [text.ids for text in load.texts[:most]]
    if engine == "transformers":
        seconds, vectors = padded(path, ids)
    else:
        seconds, vectors = vllm(path, ids, quantization="fp8" if engine == "vllm-fp8" else None)
    return {"tokens_per_s": sum(map(len, ids)) / seconds, **load.check(vectors, engine)}


def measure(encoder: Any, load: Load, rate: float, engine: str) -> dict[str, Any]:
    """Tokens a second of one load, from ids to vectors: as the service runs it, and handed to the engine in one call."""
    found: dict[str, Any] = {}
    for way in ("service", "one call"):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        stats: dict[str, Any] = {}
        if way == "service":
            seconds, vectors, stats = scheduled(encoder, load.texts, default_batch_tokens("cuda"))
        elif load.name != "log-normal":
            continue  # one load says what the scheduler costs
        else:
            begin = time.perf_counter()
            vectors = encoder.submit(load.texts).result()
            seconds = time.perf_counter() - begin
        found[way] = {
            "tokens_per_s": load.tokens / seconds,
            "texts_per_s": len(load.texts) / seconds,
            "of_ceiling": load.tokens / seconds / rate,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            **stats,
            **load.check(vectors, engine),
        }
    return found


def run(arguments: argparse.Namespace, out: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything asked for; `out` gets what is known after each step."""
    results: dict[str, Any] = {"shape": arguments.shape, "gpu": torch.cuda.get_device_name()}
    path = Path(arguments.model or Path(tempfile.gettempdir()) / f"embedq-{arguments.shape}")
    begin = time.perf_counter()
    make(path, arguments.shape)
    print(f"checkpoint {time.perf_counter() - begin:.1f} s", flush=True)
    loads = [Load(path, name, SHAPES[arguments.shape]["vocabulary"]) for name in arguments.corpora.split(",")]
    _free()
    for engine in arguments.engines.split(","):
        results[engine] = found = {}
        if engine not in OURS:
            if engine.startswith("vllm") and not has_vllm():
                print(f"{engine}: not installed", flush=True)
                continue
            for load in loads:
                found[load.name] = measure_peer(path, load, engine, arguments.padded_texts)
                print(f"{engine} {load.name}: {_line(found[load.name])}", flush=True)
                out(results)
            _free()
            continue
        measure_ours(path, engine, loads, found, lambda: out(results), arguments)
        _free()
    return results


def measure_ours(
    path: Path,
    engine: str,
    loads: Sequence[Load],
    found: dict[str, Any],
    out: Callable[[], None],
    arguments: argparse.Namespace,
) -> None:
    """Everything about one dtype of our engine, into `found`."""
    begin = time.perf_counter()
    with (
        patch.object(qwen3_cuda, "obstacle", lambda *_: "switched off")
        if engine == "bf16-separate"
        else nullcontext()
    ):
        encoder: Any = load_encoder(path, device="cuda", quantization="fp8" if engine == "fp8" else "none")
    found["load_s"] = time.perf_counter() - begin
    found["phases"] = dict(getattr(encoder, "phases", {}))
    found["kernels"] = dict(encoder.kernels)
    found["memory_gib"] = torch.cuda.memory_allocated() / 2**30
    print(
        f"{engine} loaded {found['load_s']:.1f} s {found['memory_gib']:.2f} GiB {found['kernels']}",
        flush=True,
    )
    print(f"   phases {found['phases']}", flush=True)
    found["latency_ms"] = [latency(encoder, n) for n in arguments.latency]
    for row in found["latency_ms"]:
        print(f"{engine} one text: {row}", flush=True)
    out()
    found["ceiling"] = rate = ceiling(encoder)
    print(f"{engine} products alone {rate}", flush=True)
    for load in loads:
        found[load.name] = measure(encoder, load, rate["sustained"], engine)
        for way, row in found[load.name].items():
            print(f"{engine} {load.name}, {way}: {_line(row)}", flush=True)
        out()
    # The card warms up: a ceiling measured after all loads says how far the first one still holds.
    found["ceiling_again"] = ceiling(encoder, 3.0)
    print(f"{engine} products alone, again {found['ceiling_again']}", flush=True)
    if arguments.profile:
        found["profile"] = {str(n): profile(encoder, n) for n in (8192, 16)}
        for n, rows in found["profile"].items():
            for line in rows:
                print(f"   {n} {line}", flush=True)
    out()
    encoder.close()


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, int | float))


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4B")
    parser.add_argument("--model", help="where the checkpoint is or goes; the temporary directory otherwise")
    parser.add_argument("--engines", default="bf16,bf16-separate,fp8,transformers,vllm,vllm-fp8")
    parser.add_argument(
        "--corpora", default="log-normal", help=f"of {', '.join(LENGTHS)}, separated by commas"
    )
    parser.add_argument("--padded-texts", type=int, default=1000, help="of each load, for the other engines")
    parser.add_argument(
        "--latency", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512, 1024], help="tokens of one text"
    )
    parser.add_argument("--profile", action="store_true", help="print and write the time of each kernel")
    parser.add_argument("--name", default="engine")
    arguments = parser.parse_args()

    def out(results: dict[str, Any]) -> None:
        write(arguments.name, results, *GPU_PACKAGES, "vllm")

    out(run(arguments, out))


if __name__ == "__main__":
    main()
