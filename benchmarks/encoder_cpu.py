"""The encoder alone on a CPU, next to sentence-transformers' `encode` on the same texts: `python -m benchmarks.encoder_cpu`.

Both do all the work from text to normalized float32 vector, in one process, taking turns in every round, so that
whatever else the machine does falls on both. sentence-transformers sees all texts at once, sorts them by length and
pads batches of 32; the encoder sees micro-batches in order of arrival, as the service hands them over. The vectors are
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from benchmarks.machine import write
from benchmarks.texts import sentences
from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from tests.helpers.tiny_models import minilm_path

MICRO_BATCHES = (256, 1024, 4096)
TOLERANCE = 1e-5


def main() -> None:
    """Print a table and write benchmarks/results/encoder_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="a model directory; MiniLM unless given")
    parser.add_argument(
        "--threads", type=int, default=None, help="PyTorch's threads, for both; all cores unless given"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=300, help="how many sentences; half as many mixed texts")
    options = parser.parse_args()
    model = options.model or minilm_path()
    encoder = load_encoder(model, device="cpu", threads=options.threads)
    # Imported only here: `load_encoder` sets OpenMP up before PyTorch is imported.
    from embedq_consumer.engine.models.bert_cpu import PackedBert

    with patch.object(PackedBert, "fits", return_value=False):
        general = load_encoder(model, device="cpu", threads=options.threads)
    reference = _sentence_transformers(model)
    lines = sentences()[: options.texts]
    results: dict[str, Any] = {"model": model.name, "rounds": options.rounds, "threads": options.threads}
    for name, texts in (("sentences", lines), ("mixed", mixed(lines)[: len(lines) // 2])):
        results[name] = compare(name, texts, encoder, general, reference, options.rounds)
    packages = ("torch", "transformers", "tokenizers", "sentence-transformers", "numpy")
    print(f"written to {write('encoder_cpu', results, *packages)}")


def mixed(lines: list[str]) -> list[str]:
    """Paragraphs of 1 to 12 sentences, most of them short, as documents are."""
    sizes = (1, 1, 2, 1, 4, 1, 2, 12, 1, 3, 1, 6)
    return [" ".join((lines + lines)[i : i + sizes[i % len(sizes)]]) for i in range(len(lines))]


def compare(
    name: str, texts: list[str], encoder: Encoder, general: Encoder, reference: Any, rounds: int
) -> dict[str, Any]:
    """Seconds of each way, and how many times faster than sentence-transformers it was, by median and by best."""
    ids = _tokens(encoder, texts)
    lengths = [len(i) for i in ids]
    difference = float(np.abs(embed(encoder, texts, 1024) - reference.encode(texts)).max())
    if difference > TOLERANCE:
        raise SystemExit(f"vectors differ by {difference:.1e}: there is nothing to time")
    ways: dict[str, Callable[[], object]] = {
        "sentence-transformers": lambda: reference.encode(texts, show_progress_bar=False)
    }
    for limit in MICRO_BATCHES:
        ways[f"embedq, batches of {limit} tokens"] = partial(embed, encoder, texts, limit)
    ways["embedq, transformers' code, 1024"] = lambda: embed(general, texts, 1024)
    ways["embedq, tokenizing alone"] = lambda: _tokens(encoder, texts)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[way].append(time.perf_counter() - started)
    print(
        f"\n{name}: {len(texts)} texts, {sum(lengths)} tokens, {min(lengths)} to {max(lengths)} each, "
        f"largest difference {difference:.1e}"
    )
    print(f"{'':36}{'seconds':>10}{'tokens/s':>10}{'times':>8}{'best':>8}")
    base = seconds["sentence-transformers"]
    rows = {}
    for way, times in seconds.items():
        median = statistics.median(times)
        ratio, best = statistics.median(base) / median, min(base) / min(times)
        print(f"{way:36}{median:10.3f}{sum(lengths) / median:10.0f}{ratio:8.2f}{best:8.2f}", flush=True)
        rows[way] = {"seconds": times, "median": median, "times": ratio, "times_of_best": best}
    return {
        "texts": len(texts),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "largest_difference": difference,
        "ways": rows,
    }


def embed(encoder: Encoder, texts: list[str], limit: int) -> npt.NDArray[np.float32]:
    """Tokenize, run in micro-batches of at most `limit` tokens in order of arrival, normalize."""
    vectors = np.concatenate([encoder.encode(batch) for batch in _batches(_tokens(encoder, texts), limit)])
    unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _tokens(encoder: Encoder, texts: list[str]) -> list[npt.NDArray[np.int32]]:
    found = encoder.tokenize([Text(text, truncate="end") for text in texts])
    return [tokens.ids for tokens in found if isinstance(tokens, Tokens)]


def _batches(ids: list[npt.NDArray[np.int32]], limit: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    batch: list[npt.NDArray[np.int32]] = []
    for i in ids:
        if batch and sum(map(len, batch)) + len(i) > limit:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _sentence_transformers(model: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(model), device="cpu", local_files_only=True)


if __name__ == "__main__":
    main()
