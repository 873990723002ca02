"""Out of memory and a lost device: real ones, on the CPU where it can have them and on CUDA."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import OutOfMemory, Tokens, load_encoder
from embedq_consumer.engine.device import guarded, named
from tests.helpers.support import patient

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CPU = torch.device("cpu")


class Late:
    """Its work is done when its result is asked for."""

    def result(self) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = torch.empty(1 << 50).numpy()
        return found


def test_memory_that_the_processor_does_not_have_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory), named(CPU):
        torch.empty(1 << 50)
    with pytest.raises(OutOfMemory), named(CPU):
        np.empty(1 << 60, dtype=np.uint8)


def test_a_result_that_fails_later_gets_its_name_too() -> None:
    pending = guarded(CPU, Late)
    with pytest.raises(OutOfMemory):
        pending.result()


def test_other_failures_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), named(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """As much device memory as is in use, and a little more."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@cuda
def test_a_micro_batch_that_does_not_fit_harms_no_other(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = load_encoder(make(tmp_path, "tiny"), device="cuda")
    random = np.random.default_rng(0)
    ids = random.integers(3, SHAPES["tiny"]["vocabulary"], 2_000_000).astype(np.int32)
    short = [Tokens(ids[:100]), Tokens(ids[100:300])]
    expected = encoder.submit(short).result()
    request.getfixturevalue("little_memory")
    for _ in range(8):  # more often than the engine has places for micro-batches under way
        with pytest.raises(OutOfMemory):
            encoder.submit([Tokens(ids)]).result()
        np.testing.assert_array_equal(encoder.submit(short).result(), expected)
    memory = encoder.memory()
    assert memory is not None
    assert 0 < memory.free <= memory.total
    assert memory.peak > 0


BREAK = """
import torch
from embedq_consumer.engine import DeviceLost
from embedq_consumer.engine.device import named
device = torch.device("cuda:0")
for _ in range(2):
    try:
        with named(device):
            torch.zeros(4, device=device)[torch.tensor([9], device=device)].cpu()
    except DeviceLost as error:
        print("lost:", error)
"""


@pytest.mark.gpu
@cuda
def test_a_context_that_is_broken_is_a_lost_device_from_then_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BREAK], capture_output=True, text=True, timeout=patient(100), check=False
    )
    assert done.stdout.count("lost: cuda:0") == 2, done.stderr
