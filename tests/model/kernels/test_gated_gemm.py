"""Gate and up as one product that gates: what does not need Hopper and quack-kernels, as tests/gpu does."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.kernels.gated_gemm import fuses, interleaved, obstacle

WIDTH, INNER = 1536, 512


def weights(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (torch.randn(WIDTH, INNER, device=device, generator=generator) for _ in "ab")
    return (gate * INNER**-0.5).to(torch.bfloat16), (up * INNER**-0.5).to(torch.bfloat16)


def test_interleaved_weights_alternate() -> None:
    gate, up = weights("cpu")
    mixed = interleaved(gate, up)
    assert mixed.is_contiguous()
    assert torch.equal(mixed[0::2], gate)
    assert torch.equal(mixed[1::2], up)


def test_only_many_rows_in_few_counts_are_fused() -> None:
    assert [rows for rows in (16, 256, 512, 513, 640, 1000, 16384) if fuses(rows)] == [512, 640, 16384]


def test_why_a_cpu_has_no_product_that_gates() -> None:
    assert obstacle(WIDTH, INNER, torch.device("cpu")) == "no_hopper_gpu"
