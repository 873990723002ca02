"""Vectors against sentence-transformers in float32: how near, and whether the nearest neighbors are the same.

`python -m benchmarks.accuracy` runs every engine of this machine (float32 on the CPU; bf16 and FP8 on CUDA) over 2,000
texts of many kinds with all-MiniLM-L6-v2, and over fewer with tiny random models of other architectures. It fails where
a bound is missed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import GPU_PACKAGES, write
from benchmarks.texts import varied
from embedq_consumer.engine import ModelError, Quantization, Text, Tokens, load_encoder
from embedq_consumer.verify.similarity import agreements, nearest
from tests.helpers.tiny_models import (
    make_tiny_bert,
    make_tiny_gemma3,
    make_tiny_modernbert,
    make_tiny_qwen3,
    make_tiny_xlm_roberta,
    minilm_path,
)

Vectors = npt.NDArray[np.float32]

NEIGHBORS = 10
LEAST = {"float32": 0.99999, "bf16": 0.9995, "fp8": 0.995}
"""The least cosine of any text, for trained weights. Random ones amplify rounding: for them only float32 is bound."""
MOST_DIFFERENCE = 1e-5
"""Of any component, in float32."""

TINY: dict[str, Callable[[Path], Path]] = {
    "tiny Qwen3": lambda path: make_tiny_qwen3(path, max_tokens=512),
    "tiny XLM-R": make_tiny_xlm_roberta,
    "tiny BERT, first token": lambda path: make_tiny_bert(path, pooling="cls"),
    "tiny ModernBERT": make_tiny_modernbert,
    "tiny Gemma 3": make_tiny_gemma3,
}


def engines() -> dict[str, tuple[str, Quantization]]:
    """Device and quantization of each engine that this machine has."""
    known: dict[str, tuple[str, Quantization]] = {"float32": ("cpu", "none")}
    if torch.cuda.is_available():
        known["bf16"] = ("cuda", "none")
        if torch.cuda.get_device_capability() >= (9, 0):
            known["fp8"] = ("cuda", "fp8")
    return known


def reference(path: Path, texts: list[str]) -> Vectors:
    """sentence-transformers' vectors, float32 on the CPU, of length 1."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    vectors: Vectors = model.encode(texts, show_progress_bar=False, normalize_embeddings=True, batch_size=16)
    return vectors.astype(np.float32)


def ours(
    path: Path, texts: list[str], device: str, quantization: Quantization
) -> tuple[Vectors, Mapping[str, str]]:
    """The engine's, all texts in one call; and which kernels ran."""
    encoder = load_encoder(path, device=device, quantization=quantization)
    default = encoder.default_prompt
    tokens = encoder.tokenize([Text(text, prompt=default, truncate="end") for text in texts])
    vectors = encoder.encode([found.ids for found in tokens if isinstance(found, Tokens)])
    encoder.close()
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit, encoder.kernels


def compare(found: Vectors, wanted: Vectors) -> dict[str, float]:
    """One row of the table."""
    cosines = (found.astype(np.float64) * wanted).sum(axis=1)
    neighbors, _ = agreements(nearest(found, NEIGHBORS), nearest(wanted, NEIGHBORS))
    return {
        "cosine_min": float(cosines.min()),
        "cosine_p1": float(np.quantile(cosines, 0.01)),
        "cosine_p50": float(np.median(cosines)),
        "cosine_mean": float(cosines.mean()),
        "largest_difference": float(np.abs(found - wanted).max()),
        "top10_agreement": neighbors.mean,
    }


def measure(
    name: str, path: Path, texts: list[str], wanted_engines: set[str], *, trained: bool
) -> dict[str, Any]:
    """Every engine against the reference; prints a line for each.

    Raises:
        AssertionError: an engine is further off than it may be.
    """
    wanted = reference(path, texts)
    rows: dict[str, Any] = {}
    for engine, (device, quantization) in engines().items():
        if engine not in wanted_engines:
            continue
        try:
            found, kernels = ours(path, texts, device, quantization)
        except ModelError as error:
            rows[engine] = {"refused": str(error).rpartition(": ")[2]}
            print(f"{name:24} {engine:8} refused: {rows[engine]['refused']}", flush=True)
            continue
        row = compare(found, wanted)
        rows[engine] = {**row, "kernels": dict(kernels)}
        print(
            f"{name:24} {engine:8} {row['cosine_min']:.6f} {row['cosine_p1']:.6f} {row['cosine_mean']:.6f} "
            f"{row['largest_difference']:.1e} {row['top10_agreement']:.4f}",
            flush=True,
        )
        if trained or engine == "float32":
            assert row["cosine_min"] >= LEAST[engine], f"{name}, {engine}: {row}"
        if engine == "float32":
            assert row["largest_difference"] <= MOST_DIFFERENCE, f"{name}, {engine}: {row}"
    return {"texts": len(texts), "trained": trained, "engines": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--model", type=Path, help="a trained model; all-MiniLM-L6-v2 where it is installed")
    parser.add_argument("--engines", default=",".join(LEAST), help="of those that the machine has")
    parser.add_argument(
        "--tiny", action=argparse.BooleanOptionalAction, default=True, help="other architectures too"
    )
    parser.add_argument("--name", default="accuracy")
    arguments = parser.parse_args()
    path = arguments.model or minilm_path()
    name = arguments.model.name if arguments.model else "all-MiniLM-L6-v2"
    print(f"{'model':24} {'engine':8} cosine: min, 1 %, mean; largest difference; top-{NEIGHBORS} agreement")
    wanted = set(arguments.engines.split(","))
    results = {name: measure(name, path, varied(arguments.texts), wanted, trained=True)}
    for name, make in TINY.items() if arguments.tiny else ():
        with tempfile.TemporaryDirectory() as folder:
            texts = varied(min(500, arguments.texts))
            results[name] = measure(name, make(Path(folder) / "model"), texts, wanted, trained=False)
    print(write(arguments.name, results, *GPU_PACKAGES, "sentence-transformers"))


if __name__ == "__main__":
    main()
