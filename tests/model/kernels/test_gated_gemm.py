"""Gate and up as one product that gates, against its definition: the product itself needs Hopper and quack-kernels."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # read as kernels are defined
pytest.importorskip("triton")

from embedq_consumer.engine.kernels.fused_ops import gate_reference
from embedq_consumer.engine.kernels.gated_gemm import fuses, gated_linear, interleaved, obstacle

WIDTH, INNER = 1536, 512


def weights(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (torch.randn(WIDTH, INNER, device=device, generator=generator) for _ in "ab")
    return (gate * INNER**-0.5).to(torch.bfloat16), (up * INNER**-0.5).to(torch.bfloat16)


def test_interleaved_weights_take_turns() -> None:
    gate, up = weights("cpu")
    mixed = interleaved(gate, up)
    assert mixed.is_contiguous()
    assert torch.equal(mixed[0::2], gate)
    assert torch.equal(mixed[1::2], up)


def test_only_many_rows_in_few_counts_are_fused() -> None:
    assert [rows for rows in (16, 256, 512, 513, 640, 1000, 16384) if fuses(rows)] == [512, 640, 16384]


def test_why_a_cpu_has_no_product_that_gates() -> None:
    assert obstacle(WIDTH, INNER, torch.device("cpu")) == "no Hopper GPU"


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    why = obstacle(WIDTH, INNER, torch.device("cuda", 0))
    if why in ("no Hopper GPU", "quack-kernels is not installed"):
        pytest.skip(why)
    assert why is None  # it is there, so it must work
    return "cuda:0"


def rows_of(count: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(count)
    return torch.randn(count, INNER, device=device, generator=generator).to(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [512, 640, 4096])
def test_a_product_that_gates_is_that_product_gated(device: str, count: int) -> None:
    gate, up = weights(device)
    rows = rows_of(count, device)
    wanted = gate_reference(rows.float() @ torch.cat([gate, up]).float().t())
    found = gated_linear(rows, interleaved(gate, up)).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.004


@pytest.mark.gpu
def test_a_row_is_gated_to_the_same_bits_among_other_rows(device: str) -> None:
    mixed = interleaved(*weights(device))
    rows = rows_of(4096, device)
    among = gated_linear(rows, mixed)
    assert torch.equal(among[1536:2048], gated_linear(rows[1536:2048].contiguous(), mixed))


@pytest.mark.gpu
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
