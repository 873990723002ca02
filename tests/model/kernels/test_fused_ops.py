"""The Triton kernels against their definitions: on the GPU where there is one, in Triton's interpreter otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine import row as row_module
from embedq_consumer.engine.kernels import fused_ops as kernels
from embedq_consumer.engine.prefix_cache import MARGIN
from embedq_consumer.engine.row import copy_plan, key_seqlens

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = 0.006  # the interpreter cuts where the device rounds
FP8 = 0.09


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def values(scaled: torch.Tensor | kernels.QuantizedRows) -> torch.Tensor:
    return scaled[0].float() * scaled[1] if isinstance(scaled, tuple) else scaled


@pytest.mark.parametrize("width", [96, 256, 2560, 3000])
@pytest.mark.parametrize("add", [False, True])
def test_norm_of_a_sum(width: int, add: bool) -> None:
    x, y, weight = random(5, width), random(6, width)[:5] if add else None, 1 + 0.1 * random(width)
    total, normed = kernels.fused_add_rms_norm_reference(x, y, weight, 1e-6)
    for quantized, least in ((False, BF16), (True, FP8)):
        kept = x.clone()
        assert (
            error(values(kernels.fused_add_rms_norm(kept, y, weight, 1e-6, quantized=quantized)), normed)
            < least
        )
        assert error(kept, total) < BF16
    kept = x.clone()
    out = torch.empty(5, width, device=DEVICE)
    kernels.fused_add_rms_norm(kept, y, weight, 1e-6, store_sum=False, out=out)
    assert error(out, normed) < BF16
    assert torch.equal(kept, x)


@pytest.mark.parametrize("width", [96, 1024, 3000, 9728])
def test_silu_and_mul(width: int) -> None:
    rows = 3 * random(3, 2 * width)
    assert error(values(kernels.silu_and_mul(rows)), kernels.silu_and_mul_reference(rows)) < BF16
    assert (
        error(values(kernels.silu_and_mul(rows, quantized=True)), kernels.silu_and_mul_reference(rows)) < FP8
    )


@pytest.mark.parametrize("width", [96, 1024, 3000])
def test_gate_of_interleaved_rows(width: int) -> None:
    rows = 3 * random(3, 2 * width)
    mixed = rows.view(3, 2, width).transpose(1, 2).reshape(3, 2 * width).contiguous()
    for quantized, least in ((False, BF16), (True, FP8)):
        found = kernels.silu_and_mul(mixed, quantized=quantized, interleaved=True)
        assert error(values(found), kernels.silu_and_mul_reference(rows)) < least


def test_gate_of_large_numbers_is_finite() -> None:
    rows = torch.tensor([[-300.0, 300.0, 0.0, -90.0] * 8 + [2.0] * 32], dtype=torch.bfloat16, device=DEVICE)
    assert torch.allclose(
        values(kernels.silu_and_mul(rows)).float(), kernels.silu_and_mul_reference(rows), atol=1e-3
    )


def test_a_row_of_zeros_quantizes_to_zeros() -> None:
    assert not values(
        kernels.per_token_quant_fp8(torch.zeros(2, 256, dtype=torch.bfloat16, device=DEVICE))
    ).any()


@pytest.mark.parametrize("width", [96, 4096])
def test_quantized_rows_are_near_what_they_stand_for(width: int) -> None:
    rows = random(4, width)
    found, reference = kernels.per_token_quant_fp8(rows), kernels.per_token_quant_fp8_reference(rows)
    assert error(values(found), rows) < FP8
    assert error(found[1], reference[1]) < 1e-6


@pytest.mark.parametrize("heads", [(4, 2, 32), (32, 8, 128), (3, 1, 64), (8, 0, 32), (0, 8, 32)])
@pytest.mark.parametrize("many", [False, True])
def test_norm_and_rotation_of_queries_and_keys(
    heads: tuple[int, int, int], many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q_heads, k_heads, dim = heads
    tokens = 520 if many and DEVICE == "cuda" else 6
    if (
        many and DEVICE == "cpu"
    ):  # the interpreter takes its time for each program, so a few count as many there
        monkeypatch.setattr(kernels, "_FEW_TOKENS", tokens - 1)
    qkv = random(tokens, (q_heads + 2 * k_heads) * dim)
    positions = (torch.arange(tokens, device=DEVICE) % 50).int()
    angles = random(64, dim // 2, dtype=torch.float32)
    rotation = (angles.cos(), angles.sin())
    weights = (1 + 0.1 * random(dim), 1 + 0.1 * random(dim))
    wanted = kernels.qk_norm_rope_reference(qkv, positions, rotation, weights, (q_heads, k_heads), 1e-6)
    kernels.qk_norm_rope(qkv, positions, rotation, weights, (q_heads, k_heads), 1e-6)
    assert error(qkv, wanted) < BF16


@pytest.mark.parametrize("width", [96, 512, 2560])
def test_rows_are_copied_as_planned(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    margin = MARGIN if DEVICE == "cuda" else 16
    if DEVICE == "cpu":  # fewer programs than rows, and few rows of zeros
        monkeypatch.setattr(kernels, "_COPY_PROGRAMS", 4)
        monkeypatch.setattr(row_module, "MARGIN", margin)
    texts = [(5, 3), (2, 0), (7, 4), (1, 4)]
    prefixes = [np.array(rows, dtype=np.int32) for rows in ([4, 9, 2], [], [7, 8, 1, 30], [7, 8, 1, 30])]
    cu_seqlens = np.array([0, *np.cumsum([own for own, _ in texts]), 16, 16], dtype=np.int32)
    saved_rows = np.array([20, 21, 22], dtype=np.int32)
    copies = torch.from_numpy(copy_plan(cu_seqlens, prefixes, saved_rows)).to(DEVICE)
    count = torch.tensor([len(copies)], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(16, 32 + width, generator=generator).bfloat16().to(DEVICE)
    pool = torch.randn(40, width, generator=generator).bfloat16().to(DEVICE)
    keys = (
        torch.full((int(key_seqlens(cu_seqlens, prefixes)[-1]) + margin + 5, width), torch.nan)
        .bfloat16()
        .to(DEVICE)
    )
    wanted_keys, wanted_pool = keys.clone(), pool.clone()
    pool[0] = 0
    wanted_pool[0] = 0
    own = wide[:, 32:]
    kernels.copy_rows_reference(own, wanted_pool, wanted_keys, copies, count)
    kernels.copy_rows(own, pool, keys, copies, count)
    assert torch.equal(pool, wanted_pool)
    assert torch.equal(keys[:-5], wanted_keys[:-5])
    assert keys[-5:].isnan().all()
    assert torch.equal(pool[20:23], own[:3])
    assert torch.equal(keys[:3], pool[[4, 9, 2]])
    assert not keys[-5 - margin : -5].any()
