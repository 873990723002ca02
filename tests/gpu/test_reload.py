"""A reload on CUDA, with real models: beside the old one the device is too small, and once that is gone it no longer is."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from structlog.testing import capture_logs

from benchmarks.qwen3_shapes import make
from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from embedq_consumer.lifecycle import BatchOptions
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.fake_models import Bench, command
from tests.helpers.support import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(300),
]

BATCHES: Final = BatchOptions(max_tokens=16_384, max_items=512, max_wait_s=0.0, bulk_max_wait_s=5.0)
TEXTS: Final = ["the harbor at night", "a stone wall " * 40, "winter"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of Qwen3-Embedding-0.6B's shape: 1.2 GB each."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("old", "new")):
        make(root / name, "0.6B", seed=seed)
    return root


class Device:
    """Loads models onto the GPU; beside each further one `leaves` bytes of it are free, if that is set."""

    def __init__(self) -> None:
        self.leaves: int | None = None
        self.ballast: torch.Tensor | None = None

    def load(self, path: Path) -> Encoder:
        """A loader of a slot. What is the most in use is counted from the end of a load: a load itself takes more for a while."""
        encoder = load_encoder(path, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if self.leaves is not None:
            free, _ = torch.cuda.mem_get_info()
            self.ballast = torch.empty(max(0, free - self.leaves), dtype=torch.uint8, device="cuda")
        return encoder


@pytest.fixture
def device() -> Iterator[Device]:
    gc.collect()
    torch.cuda.empty_cache()
    made = Device()
    yield made
    made.ballast = None
    torch.cuda.empty_cache()


@pytest.fixture
def bench(models: Path, device: Device) -> Iterator[Bench]:
    """A served model whose loads are real ones, onto the device. Everything that it held is free afterwards."""
    made = Bench(models, {"old": [], "new": []}, stall_timeout_s=120.0, load_timeout_s=120.0, batches=BATCHES)
    made.loader.load_path = device.load
    yield made
    if (loaded := made.model.slot.serving) is not None:
        loaded.encoder.close()
    made.model.close()


async def test_after_a_reload_the_budget_is_that_of_the_device_without_the_old_model(
    bench: Bench, device: Device, record_property: Callable[[str, object], None]
) -> None:
    others = torch.cuda.memory_reserved()
    with capture_logs() as logs:
        await bench.model.start(None)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - others
        passing = torch.cuda.max_memory_reserved() - others - held
        assert passing > 0
        # Beside both models, a third of what the longest text takes.
        device.leaves = passing // 3
        await bench.follow([command(1, "new")])
    assert (bench.serving, bench.sent[-1].state) == ("new", "READY"), bench.sent[-1].error
    alone, beside, again = (_budget(line) for line in logs if line["event"] == "batch_budget")
    for name, found in {"held": held, "passing": passing, "beside": beside, "again": again}.items():
        record_property(name, found)
    assert alone == (BATCHES.max_tokens, bench.model.slot.loaded.encoder.max_tokens)
    assert min(beside) >= 256
    assert beside != alone, "beside the old model the device is too small"
    assert again == alone
    assert bench.sample("batch_budget_tokens") == alone[0]
    assert (bench.facts["max_batch_tokens"], bench.facts["max_text_tokens"]) == alone
    assert bench.holds == ["old", "new", "new", "new"], "measured again while nothing is in flight"


async def test_beside_a_model_of_its_shape_a_reload_takes_the_budget_over_and_its_longest_text_fits(
    bench: Bench,
) -> None:
    with capture_logs() as logs:
        await bench.model.start(None)
        await bench.follow([command(1, "new")])
    assert (bench.serving, bench.sent[-1].state) == ("new", "READY"), bench.sent[-1].error
    alone, beside = (line for line in logs if line["event"] == "batch_budget")
    encoder = bench.model.slot.loaded.encoder
    assert beside["taken_over"]
    assert _budget(beside) == _budget(alone) == (BATCHES.max_tokens, encoder.max_tokens)
    assert bench.holds == ["old", "new"]
    whole = Tokens(np.arange(encoder.max_tokens, dtype=np.int32) % 1000, whole=True)
    before = torch.cuda.memory_reserved()
    vectors, _ = await bench.model.slot.encode(encoder, [whole])
    assert np.isfinite(vectors).all()
    assert torch.cuda.memory_reserved() - before <= beside["takes_bytes"]


async def test_a_model_that_came_by_a_reload_gives_the_vectors_that_it_gives_alone(bench: Bench) -> None:
    await bench.model.start(None)
    await bench.follow([command(1, "new")])
    encoder = bench.model.slot.loaded.encoder

    def cosines() -> npt.NDArray[np.float32]:
        ids = tokens_of(encoder, [Text(text) for text in TEXTS])
        alone = load_encoder(bench.root / "new", device="cuda")
        assert encoder.model_version == alone.model_version
        found: npt.NDArray[np.float32] = (
            normalized(encoder.encode(ids)) * normalized(alone.encode(ids))
        ).sum(axis=1)
        alone.close()
        return found

    np.testing.assert_array_less(0.9999, await asyncio.to_thread(cosines))


async def test_the_devices_memory_is_measured_while_a_model_serves_and_follows_a_reload(
    bench: Bench,
) -> None:
    await bench.model.start(None)
    watching = asyncio.create_task(bench.model.watch_memory())
    try:
        await wait_until(lambda: _of(bench, "total") > 0, what="a measurement")
        free, total = torch.cuda.mem_get_info()
        assert bench.sample("gpu_memory_total_bytes") == total
        assert _of(bench, "used") == pytest.approx(total - free, abs=512 << 20)
        # The embeddings alone are 310 MB of the 1.2 GB.
        assert 1_100_000_000 < _of(bench, "reserved") <= _of(bench, "used")
        assert 1_100_000_000 < _of(bench, "peak") <= torch.cuda.max_memory_allocated()
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    before = torch.cuda.memory_allocated()
    await bench.follow([command(1, "new")])
    memory = await bench.model.slot.memory()
    assert memory is not None
    # Both models lay there for a while, and one is left.
    assert memory.peak > before + 1_100_000_000
    assert torch.cuda.memory_allocated() == pytest.approx(before, rel=0.1)


def _budget(line: Any) -> tuple[int, int]:
    """Tokens of a micro-batch, and of the longest text."""
    return line["tokens"], line["longest_text"]


def _of(bench: Bench, name: str) -> float:
    return bench.sample(f"gpu_memory_{name}_bytes") or 0.0
