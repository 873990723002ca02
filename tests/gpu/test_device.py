"""Out of memory and a lost device, on CUDA."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import OutOfMemory, Tokens, load_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """As much device memory as is in use, and a little more."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_micro_batch_that_does_not_fit_harms_no_other(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = load_encoder(make(tmp_path, "tiny"), device="cuda")
    random = np.random.default_rng(0)
    ids = random.integers(3, SHAPES["tiny"]["vocabulary"], 2_000_000).astype(np.int32)
    # Whole, or the first one might read what the long text has in common with it, and round otherwise.
    short = [Tokens(ids[:100], whole=True), Tokens(ids[100:300], whole=True)]
    expected = encoder.submit(short).result()
    request.getfixturevalue("little_memory")
    for _ in range(8):  # more often than the engine has parts in flight
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
from embedq_consumer.engine.device import translate_errors
device = torch.device("cuda:0")
for _ in range(2):
    try:
        with translate_errors(device):
            torch.zeros(4, device=device)[torch.tensor([9], device=device)].cpu()
    except DeviceLost as error:
        print("lost:", error)
"""


def test_a_context_that_is_broken_is_a_lost_device_from_then_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BREAK], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.count("lost: cuda:0") == 2, done.stderr
