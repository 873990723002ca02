"""Texts through the service's own scheduling, without Kafka: equal ones once, micro-batches, two steps to the device.

`python -m benchmarks.scheduled` runs log-normal documents through a tiny model on the CPU, or `--model DIRECTORY`, and
as well as the same texts straight through the encoder, in micro-batches of the same budget in order of arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import write
from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.single_flight import Identity, QueuedText, SingleFlight
from embedq_consumer.engine import (
    Cancellation,
    Encoder,
    Inspection,
    Text,
    Tokens,
    default_batch_tokens,
    load_encoder,
)
from embedq_consumer.lifecycle.model_slot import ModelSlot, Source
from embedq_consumer.settings import Settings
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.grouping import batched_by

Vectors = npt.NDArray[np.float32]

_DEFAULTS = Settings(kafka_servers="none:1", model="none")


def scheduled(
    encoder: Encoder, texts: Sequence[Tokens], budget: int
) -> tuple[float, Vectors, dict[str, Any]]:
    """(seconds, float32 vectors (texts, hidden), what the scheduler did) of a backlog: all texts wait from the start.

    Seconds are from ids on the host to vectors on the host. A text that the encoder cannot run is an error here.
    """
    slot = ModelSlot(_Loaded())
    try:
        return asyncio.run(_Backlog(slot, encoder, texts, budget).run())
    finally:
        slot.close()


class _Loaded:
    """Loads nothing: the model is there."""

    def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        raise NotImplementedError

    def read_ahead(self, source: Source, cancel: Cancellation) -> bool:
        raise NotImplementedError

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        raise NotImplementedError


class _Client:
    """Whose all texts are."""

    client = b""


class _Backlog:
    """One run: the pipeline's part between the tokenizer and the outcomes, with a place in an array for a job."""

    def __init__(self, slot: ModelSlot, encoder: Encoder, texts: Sequence[Tokens], budget: int) -> None:
        self._slot = slot
        self._encoder = encoder
        self._texts = texts
        self._budget = budget
        self._vectors = np.zeros((len(texts), encoder.hidden_size), dtype=np.float32)
        self._left = len(texts)
        self._batches: list[int] = []
        self._computed = 0
        self._device_s = 0.0
        self._done = asyncio.Event()
        self._flights: Any = SingleFlight()  # whose waiters are rows of `_vectors` here, all of one client

    async def run(self) -> tuple[float, Vectors, dict[str, Any]]:
        batcher = Batcher[QueuedText](
            BatchPolicy(
                max_tokens=self._budget,
                max_items=_DEFAULTS.max_batch_items,
                max_wait=_DEFAULTS.max_wait_ms / 1000,
                bulk_max_wait=_DEFAULTS.bulk_max_wait_s,
            )
        )
        async with asyncio.TaskGroup() as tasks:
            begin = time.perf_counter()
            batcher.put(self._items(asyncio.get_running_loop().time()))
            worker = tasks.create_task(BatchLoop(batcher, self._run_batch, Metrics(), tasks).run())
            if self._left:
                await self._done.wait()
            seconds = time.perf_counter() - begin
            worker.cancel()
        full = self._batches[:-1] or self._batches
        return (
            seconds,
            self._vectors,
            {
                "computed_texts": self._computed,
                "micro_batches": len(self._batches),
                "fill": sum(min(1.0, tokens / self._budget) for tokens in full) / max(1, len(full)),
                "device_busy": self._device_s / seconds,
            },
        )

    def _items(self, now: float) -> list[QueuedText]:
        items = []
        for row, tokens in enumerate(self._texts):
            text = Text(tokens.ids.tobytes().decode("latin-1"))
            identity = Identity("bulk", text, self._encoder)
            if self._flights.join(identity, (_Client, row)):
                items.append(QueuedText(identity=identity, tokens=tokens, arrived=now))
        return items

    async def _run_batch(self, batch: Sequence[QueuedText]) -> None:
        vectors, seconds = await self._slot.encode(self._encoder, [item.tokens for item in batch])
        self._batches.append(sum(item.cost for item in batch))
        self._computed += len(batch)
        self._device_s += seconds
        for item, vector in zip(batch, vectors, strict=True):
            rows = [row for _, row in self._flights.resolve(item.identity)]
            self._vectors[rows] = vector
            self._left -= len(rows)
        if not self._left:
            self._done.set()


def straight(encoder: Encoder, texts: Sequence[Tokens], budget: int) -> tuple[float, Vectors]:
    """(seconds, vectors) of the encoder alone, on a thread as in the service: PyTorch's threads wait in another way there."""

    def run() -> tuple[float, Vectors]:
        begin = time.perf_counter()
        vectors = np.concatenate(
            [encoder.submit(batch).result() for batch in batched_by(texts, lambda text: text.cost, budget)]
        )
        return time.perf_counter() - begin, vectors

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


def _documents(count: int, encoder: Encoder, model: Path) -> list[Tokens]:
    random = np.random.default_rng(0)
    vocabulary = _vocabulary(model)
    lengths = np.clip(random.lognormal(np.log(180), 0.9, count), 8, min(2048, encoder.max_tokens))
    return [Tokens(random.integers(3, vocabulary, int(n)).astype(np.int32)) for n in lengths]


def _vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--budget", type=int, default=0, help="tokens of a micro-batch; 0: the device's")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # The engine sets PyTorch's threads up: before its import.
    budget = options.budget or default_batch_tokens("auto")
    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if model is None:
            from tests.helpers.tiny_models import make_tiny_qwen3

            model = make_tiny_qwen3(Path(directory) / "tiny")
        encoder = load_encoder(model)
        texts = _documents(options.texts, encoder, model)
        tokens = sum(text.cost for text in texts)
        straight(encoder, texts, budget)  # warms up
        rounds = []
        for _ in range(options.rounds):
            alone, expected = straight(encoder, texts, budget)
            seconds, vectors, stats = scheduled(encoder, texts, budget)
            unit, wanted = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, expected))
            cosine = float((unit * wanted).sum(axis=1).min())
            assert cosine >= 0.99, cosine
            rounds.append(
                {"tokens_per_s": tokens / seconds, "straight_tokens_per_s": tokens / alone, **stats}
            )
            print(
                f"{len(texts)} texts, {tokens} tokens: {tokens / seconds:.0f} tokens/s scheduled, {tokens / alone:.0f} "
                f"straight; {stats['micro_batches']} micro-batches, fill {stats['fill']:.4f}, device busy "
                f"{stats['device_busy']:.3f}",
                flush=True,
            )
        encoder.close()
    print(f"written to {write('scheduled', {'budget': budget, 'rounds': rounds}, 'torch', 'numpy')}")


if __name__ == "__main__":
    main()
