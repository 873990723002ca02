"""Gate and up as one product that gates, against its definition; needs Hopper and quack-kernels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.qwen3_shapes import make
from embedq_consumer.engine import load_encoder
from embedq_consumer.engine.kernels.fused_ops import silu_and_mul_reference
from embedq_consumer.engine.kernels.gated_gemm import gated_linear, interleaved, obstacle
from tests.model.kernels.test_gated_gemm import INNER, WIDTH, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture
def device() -> str:
    why = obstacle(WIDTH, INNER, torch.device("cuda", 0))
    if why in ("no_hopper_gpu", "no_quack_kernels"):
        pytest.skip(why)
    assert why is None  # it is installed, so it must work
    return "cuda:0"


def rows_of(count: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(count)
    return torch.randn(count, INNER, device=device, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("count", [512, 640, 4096])
def test_a_product_that_gates_is_that_product_gated(device: str, count: int) -> None:
    gate, up = weights(device)
    rows = rows_of(count, device)
    wanted = silu_and_mul_reference(rows.float() @ torch.cat([gate, up]).float().t())
    found = gated_linear(rows, interleaved(gate, up)).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.004


def test_a_row_is_gated_to_the_same_bits_among_other_rows(device: str) -> None:
    mixed = interleaved(*weights(device))
    rows = rows_of(4096, device)
    among = gated_linear(rows, mixed)
    assert torch.equal(among[1536:2048], gated_linear(rows[1536:2048].contiguous(), mixed))


def test_a_product_that_gates_can_be_captured(device: str) -> None:
    mixed = interleaved(*weights(device))
    rows = rows_of(1024, device)
    wanted = gated_linear(rows, mixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gated_linear(rows, mixed)
    found.zero_()
    graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(found, wanted)


def test_what_embedq_cuda_installs_is_what_runs(tmp_path: Path) -> None:
    """A kernel that is refused is replaced by a slower one, and nothing else fails."""
    if torch.cuda.get_device_capability() != (9, 0) or find_spec("flash_attn") is None:
        pytest.skip("no Hopper GPU, or without embedq[cuda]")
    encoder = load_encoder(make(tmp_path, "tiny"), device="cuda")
    assert encoder.kernels == {"attention": "flash_attn_4", "gate": "fused_epilogue"}
