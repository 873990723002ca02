"""Shared prefixes without a GPU: what finding them costs, and what sharing them saves in a float32 Qwen3 on the CPU.

`python -m benchmarks.prefixes`. Here transformers' own cache of keys and values stands for the device's pool: what is shared is
what `PrefixCache` says, and every vector is compared with that of its text alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.corpora import corpus
from benchmarks.machine import write
from embedq_consumer.engine.prefix_cache import PrefixCache
from embedq_consumer.engine.row_sizes import best_fit

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

POOL = 2048
BUDGET = 16_384
LOADS = ("tenants", "queries", "log-normal", "forty")
_NONE: Ids = np.empty(0, dtype=np.int32)


class PooledQwen3:
    """A Qwen3 of transformers, and a pool that holds keys and values of the prefixes that `PrefixCache` chooses."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModel

        self._model: Any = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        config = self._model.config
        shape = (2, config.num_hidden_layers, config.num_key_value_heads, POOL, config.head_dim)
        self._pool = torch.zeros(shape)
        self._cache = PrefixCache(POOL)
        self.saved = 0
        """Tokens that were read instead of computed."""

    def whole(self, batch: Sequence[Ids]) -> Vectors:
        """The last hidden state of each text, float32 (texts, hidden); texts of one length run together."""
        return self._vectors(batch, [_NONE] * len(batch))

    def shared(self, batch: Sequence[Ids]) -> Vectors:
        """The same, with the prefixes that pay computed once and read by the texts."""
        rows, new = self._cache.assign(batch)
        for prefix in new:
            _, keys = self._run(prefix.ids[None], prefix.read)
            for layer, kept in enumerate(keys.layers):
                for part, values in enumerate((kept.keys, kept.values)):
                    self._pool[part, layer][:, prefix.written] = values[0, :, len(prefix.read) :]
        found = [_NONE if each is None else each for each in rows]
        self.saved += sum(map(len, found))
        return self._vectors(batch, found)

    def _vectors(self, batch: Sequence[Ids], rows: Sequence[Ids]) -> Vectors:
        alike: dict[tuple[bytes, int], list[int]] = defaultdict(list)
        for index, (ids, read) in enumerate(zip(batch, rows, strict=True)):
            alike[read.tobytes(), len(ids)].append(index)
        vectors: Vectors = np.empty((len(batch), self._model.config.hidden_size), dtype=np.float32)
        for indices in alike.values():
            hidden, _ = self._run(np.stack([batch[i] for i in indices]), rows[indices[0]])
            vectors[indices] = hidden[:, -1].numpy()
        return vectors

    @torch.inference_mode()
    def _run(self, ids: Ids, read: Ids) -> tuple[Tensor, Any]:
        """Hidden states of the tokens behind those that are `read`, of texts (count, tokens), and all keys and values."""
        from transformers import DynamicCache

        past = DynamicCache()
        for layer in range(self._pool.shape[1] if len(read) else 0):
            keys, values = (part[layer][:, read].expand(len(ids), -1, -1, -1) for part in self._pool)
            past.update(keys, values, layer)
        own = torch.from_numpy(ids[:, len(read) :].astype(np.int64))
        positions = torch.arange(len(read), ids.shape[1]).expand(len(ids), -1)
        found = self._model(input_ids=own, position_ids=positions, past_key_values=past, use_cache=True)
        return found.last_hidden_state, found.past_key_values


def planning(name: str) -> dict[str, float]:
    """Microseconds of the processor for each text of one load, in micro-batches of the budget; and what is found."""
    texts = corpus(name, 150_000)
    batches = best_fit([text.cost for text in texts], BUDGET, 1024)
    ids = [[texts[i].ids for i in batch] for batch in batches]
    cache = PrefixCache(POOL)
    gc.collect()
    gc.freeze()  # as the service does once a model serves
    begin = time.process_time()
    found = [cache.assign(batch) for batch in ids]
    planned = time.process_time()
    for text in texts:
        cache.known(text.ids)
    known = time.process_time()
    read = sum(len(rows) for all_rows, _ in found for rows in all_rows if rows is not None)
    return {
        "assign_us": (planned - begin) / len(texts) * 1e6,
        "known_us": (known - planned) / len(texts) * 1e6,
        "read_of_all_tokens": read / sum(len(text.ids) for text in texts),
        "runs": sum(len(new) for _, new in found),
    }


def on_the_cpu(path: Path, name: str, count: int, rounds: int) -> dict[str, float]:
    """Tokens a second of the processor's time with and without sharing, and the largest difference between unit vectors."""
    texts = [text.ids for text in corpus(name, 600)[:count]]
    batches = [texts[begin : begin + 200] for begin in range(0, count, 200)]
    seconds: dict[str, list[float]] = {"whole": [], "shared": []}
    difference = 0.0
    for _ in range(rounds):
        model = PooledQwen3(path)
        model.whole(batches[0][:20])
        found = {}
        for way, run in (("whole", model.whole), ("shared", model.shared)):
            begin = time.process_time()
            vectors = np.concatenate([run(batch) for batch in batches])
            seconds[way].append(time.process_time() - begin)
            found[way] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        difference = max(difference, float(np.abs(found["whole"] - found["shared"]).max()))
    tokens = sum(map(len, texts))
    rates = {f"{way}_tokens_per_s": tokens / min(taken) for way, taken in seconds.items()}
    return {**rates, "largest_difference": difference, "read_of_all_tokens": model.saved / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=2000, help="of each load, on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"planning": {name: planning(name) for name in LOADS}, "cpu": {}}
    for name, row in results["planning"].items():
        print(name, ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        from tests.helpers.tiny_models import make_tiny_qwen3

        path = make_tiny_qwen3(Path(directory) / "tiny", hidden=256, layers=4)
        for name in ("tenants", "queries"):
            results["cpu"][name] = row = on_the_cpu(path, name, arguments.texts, arguments.rounds)
            print(name, ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    print(f"written to {write('prefixes', results, 'embedq', 'torch', 'transformers', 'numpy')}")


if __name__ == "__main__":
    main()
