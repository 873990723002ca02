"""The engine on a GPU against its ceiling: tokens a second, the sustained rate of its matrix products alone, one query.

`python -m benchmarks.engine --shape 4B --engines bf16,fp8,transformers`. Every engine's vectors are checked while it is
timed: shape, finite, and close to those of transformers' own forward of each text alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import write
from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_consumer.engine.fp8 import linear
from embedq_consumer.engine.graphs import Graphs, best_fit, rooms_of
from embedq_consumer.engine.kernels import quantise

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

LEAST_COSINE = {"bf16": 0.99, "fp8": 0.9, "transformers": 0.99}
"""Against transformers in bf16, on random weights, which amplify rounding as trained ones do not."""
PADDED_TOKENS = 65_536
CEILING_TOKENS = 8192
CEILING_SECONDS = 6.0


def corpus(name: str, vocabulary: int) -> list[Ids]:
    """Random ids in the lengths of one kind of load, in arrival order."""
    random = np.random.default_rng(0)
    lengths = {
        "log-normal": lambda: np.clip(random.lognormal(np.log(180), 0.9, 3000), 8, 2048),
        "queries": lambda: np.full(8000, 40),
        "forty": lambda: np.full(8000, 40),
        "512": lambda: np.full(800, 512),
        "8k": lambda: np.full(40, 8192),
        "32k": lambda: np.full(6, 32768),
    }[name]()
    texts = [random.integers(3, vocabulary, int(n)).astype(np.int32) for n in lengths]
    if name == "queries":
        for ids in texts:
            ids[:25] = texts[0][:25]  # one instruction in front of 15 tokens
    return texts


def ceiling(encoder: Any, seconds: float = CEILING_SECONDS) -> dict[str, float]:
    """Tokens a second of the engine's own weights' products alone, in a CUDA graph, once the card has settled."""
    layers = encoder._forward._layers
    quantised = isinstance(layers[0].qkv, tuple)
    with torch.inference_mode():
        rows: dict[int, Any] = {}
        for weight in (layers[0].qkv, layers[0].attended, layers[0].down):
            width = (weight[0] if quantised else weight).shape[1]
            x = torch.randn(CEILING_TOKENS, width, device="cuda", dtype=torch.bfloat16)
            rows[width] = quantise(x) if quantised else x

        def products() -> None:
            for layer in layers:
                for weight in (layer.qkv, layer.attended, layer.gate_up, layer.down):
                    linear(rows[(weight[0] if quantised else weight).shape[1]], weight)

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


def reference(path: Path, texts: Sequence[Ids]) -> Vectors:
    """Transformers' own forward of each text alone, bf16, normalised."""
    model = _transformers(path)
    found = []
    with torch.inference_mode():
        for ids in texts:
            row = torch.from_numpy(ids.astype(np.int64)).cuda().unsqueeze(0)
            found.append(model(input_ids=row).last_hidden_state[0, -1].float())
    return _unit(torch.stack(found).cpu().numpy())


def padded(path: Path, texts: Sequence[Ids]) -> tuple[float, Vectors]:
    """sentence-transformers' way: sorted by length, 32 at a time (fewer of long ones), padded; (seconds, vectors)."""
    model = _transformers(path)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)

    def run(part: Sequence[int]) -> None:
        width = max(len(texts[i]) for i in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, i in enumerate(part):
            ids[row, width - len(texts[i]) :] = torch.from_numpy(texts[i].astype(np.int64))
            mask[row, width - len(texts[i]) :] = 1
        hidden = model(input_ids=ids.cuda(), attention_mask=mask.cuda()).last_hidden_state[:, -1]
        vectors[list(part)] = hidden.float().cpu().numpy()

    together = max(1, min(32, PADDED_TOKENS // max(len(ids) for ids in texts)))
    parts = [order[i : i + together] for i in range(0, len(order), together)]
    with torch.inference_mode():
        run(parts[0])
        begin = time.perf_counter()
        for part in parts:
            run(part)
    return time.perf_counter() - begin, vectors


def measure(encoder: Any, texts: Sequence[Ids], way: str) -> tuple[float, Vectors, float]:
    """(seconds, vectors, fill of the rows) of all texts, from ids on the host to float32 vectors on the host.

    `one call` hands everything to the engine, which packs it. The other two are the scheduler's part: batches of exactly
    full rows, each encoded for itself (`batches`), or the next one submitted while one runs (`two-phase`).
    """
    graphs: Graphs = encoder._graphs
    size = graphs.part_tokens
    parts = best_fit([len(ids) for ids in texts], size, rooms_of(size)[-1] - 1)
    batches = [[texts[i] for i in part] for part in parts]
    vectors = np.zeros((len(texts), encoder.hidden_size), dtype=np.float32)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    if way == "one call":
        vectors = encoder.encode(texts)
    elif way == "batches":
        for part, batch in zip(parts, batches, strict=True):
            vectors[part] = encoder.encode(batch)
    else:
        ahead = None
        for part, batch in zip(parts, batches, strict=True):
            pending = graphs.submit(batch)
            if ahead is not None:
                vectors[ahead[0]] = ahead[1].result()
            ahead = part, pending
        assert ahead is not None
        vectors[ahead[0]] = ahead[1].result()
    seconds = time.perf_counter() - begin
    return seconds, vectors, sum(len(ids) for ids in texts) / (len(parts) * size)


def latency(encoder: Any, tokens: int, times: int = 300) -> dict[str, float]:
    """Milliseconds from one text to its unit vector, tokenizing and the way back included."""
    word = " moon"
    count = tokens
    text = "moon" + word * count
    while True:
        found = encoder.tokenize([Text(text)])[0]
        assert isinstance(found, Tokens)
        if len(found.ids) <= tokens:
            break
        text = text[: -max(1, len(text) // 50)]
    assert len(found.ids) > tokens // 2
    for _ in range(20):
        encoder.encode([found.ids])
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        found = encoder.tokenize([Text(text)])[0]
        vector = encoder.encode([found.ids])[0]
        vector = vector / np.linalg.norm(vector)
        taken.append((time.perf_counter() - begin) * 1e3)
    return {
        "tokens": len(found.ids),
        "p50": float(np.percentile(taken, 50)),
        "p99": float(np.percentile(taken, 99)),
    }


def profile(encoder: Any, tokens: int) -> list[dict[str, float | str]]:
    """Microseconds on the device by kernel, of one row of `tokens`, log-normal lengths."""
    graphs: Graphs = encoder._graphs
    texts = corpus("log-normal", 600)
    batch = [np.full(tokens, 5, dtype=np.int32)]
    if tokens >= 4096:
        parts = best_fit([len(ids) for ids in texts], tokens, rooms_of(tokens)[-1] - 1)
        batch = [texts[i] for i in parts[len(parts) // 2]]
    for _ in range(20):
        graphs.encode(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            graphs.encode(batch)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:80]] += event.device_time / 3
            calls[event.name[:80]] += 1
    rows = sorted(spent.items(), key=lambda item: -item[1])[:14]
    total = sum(spent.values())
    return [{"kernel": "total", "us": total, "share": 1.0}] + [
        {"kernel": name, "us": us, "share": us / total, "calls": calls[name] // 3} for name, us in rows
    ]


def run(arguments: argparse.Namespace, out: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything asked for; `out` gets what is known after each step."""
    results: dict[str, Any] = {"shape": arguments.shape, "gpu": torch.cuda.get_device_name()}
    path = Path(arguments.model or Path(tempfile.gettempdir()) / f"embedq-{arguments.shape}")
    begin = time.perf_counter()
    make(path, arguments.shape)
    print(f"checkpoint {time.perf_counter() - begin:.1f} s", flush=True)
    vocabulary = SHAPES[arguments.shape]["vocabulary"]
    texts = {name: corpus(name, vocabulary) for name in arguments.corpora.split(",")}
    sample = {name: list(range(0, len(found), max(1, len(found) // 40))) for name, found in texts.items()}
    wanted = {name: reference(path, [texts[name][i] for i in sample[name]]) for name in texts}
    _free()
    for engine in arguments.engines.split(","):
        results[engine] = found = {}
        if engine == "transformers":
            for name, corpus_texts in texts.items():
                seconds, vectors = padded(path, corpus_texts[: arguments.padded_texts])
                tokens = sum(len(ids) for ids in corpus_texts[: arguments.padded_texts])
                keep = [n for n, i in enumerate(sample[name]) if i < arguments.padded_texts]
                cosine = _check(vectors, [sample[name][n] for n in keep], wanted[name][keep], engine)
                found[name] = {"tokens_per_s": tokens / seconds, **cosine}
                print(f"{engine} {name}: {tokens / seconds:.0f} tok/s {cosine}", flush=True)
                out(results)
            _free()
            continue
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        encoder: Any = load_encoder(path, device="cuda", quantization="fp8" if engine == "fp8" else "none")
        found["load_s"] = time.perf_counter() - begin
        found["attention"] = encoder._forward.attention.__name__
        found["memory_gib"] = torch.cuda.memory_allocated() / 2**30
        print(
            f"{engine} loaded {found['load_s']:.1f} s {found['memory_gib']:.2f} GiB {found['attention']}",
            flush=True,
        )
        found["latency_ms"] = [latency(encoder, n) for n in (16, 32, 64, 128, 256, 512, 1024)]
        for row in found["latency_ms"]:
            print(f"{engine} one text: {row}", flush=True)
        out(results)
        found["ceiling"] = rate = ceiling(encoder)
        print(f"{engine} products alone {rate}", flush=True)
        for name, corpus_texts in texts.items():
            tokens = sum(len(ids) for ids in corpus_texts)
            found[name] = {}
            for way in arguments.ways.split(","):
                seconds, vectors, fill = measure(encoder, corpus_texts, way)
                cosine = _check(vectors, sample[name], wanted[name], engine)
                found[name][way] = {
                    "tokens_per_s": tokens / seconds,
                    "of_ceiling": tokens / seconds / rate["sustained"],
                    "fill": fill,
                    **cosine,
                }
                print(
                    f"{engine} {name} {way}: {tokens / seconds:.0f} tok/s, {tokens / seconds / rate['sustained']:.3f}"
                    f" of the products alone, fill {fill:.3f}, {cosine}",
                    flush=True,
                )
                out(results)
        graphs: Graphs = encoder._graphs
        standard = graphs.part_tokens
        for size in arguments.sweep:
            graphs.part_tokens = size
            first = next(iter(texts))
            seconds, vectors, fill = measure(encoder, texts[first], "one call")
            _check(vectors, sample[first], wanted[first], engine)
            speed = sum(len(ids) for ids in texts[first]) / seconds
            found[f"{first}, rows of {size}"] = {"tokens_per_s": speed, "fill": fill}
            print(
                f"{engine} {first} rows of {size}: {speed:.0f} tok/s, {speed / rate['sustained']:.3f}",
                flush=True,
            )
        graphs.part_tokens = standard
        del graphs  # which holds the model
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["profile"] = {str(n): profile(encoder, n) for n in (8192, 16)}
        for n, rows in found["profile"].items():
            for line in rows:
                print(f"   {n} {line}", flush=True)
        out(results)
        encoder.close()
        del encoder
        _free()
    return results


def _check(vectors: Vectors, indices: Sequence[int], wanted: Vectors, engine: str) -> dict[str, float]:
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all(), "not finite"
    cosines = (_unit(vectors[list(indices)]) * wanted).sum(axis=1)
    assert cosines.min() >= LEAST_COSINE[engine], cosines
    return {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _transformers(path: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).cuda().eval()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4B")
    parser.add_argument("--model", help="where the checkpoint is or goes; the temporary directory otherwise")
    parser.add_argument("--engines", default="bf16,fp8,transformers")
    parser.add_argument("--corpora", default="log-normal")
    parser.add_argument("--ways", default="one call,batches,two-phase")
    parser.add_argument("--padded-texts", type=int, default=1000)
    parser.add_argument("--sweep", type=int, nargs="*", default=[], help="other sizes of rows, in tokens")
    parser.add_argument("--name", default="engine")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "triton", "flash-attn-4")

    def out(results: dict[str, Any]) -> None:
        write(arguments.name, results, *packages)

    out(run(arguments, out))


if __name__ == "__main__":
    main()
