"""Products and attention of few tokens against their definitions: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.kernels import skinny_gemm as skinny
from embedq_consumer.engine.kernels.gated_gemm import interleaved

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies no bf16; on the device the engine's own tests cover FP8.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CLOSE = 0.006


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_product_of_few_rows(gated: bool, residual: bool) -> None:
    width = (
        4096 if DEVICE == "cuda" else 512
    )  # columns by columns: the interpreter takes its time for each program
    x, weight = random(16, 512), random(width, 512)
    added = random(16, width // 2 if gated else width) if residual else None
    plan = {"COLUMNS": 32, "STEP": 256, "num_warps": 4, "num_stages": 3}
    wanted = skinny.skinny_linear_reference(x, weight, gated=gated, residual=added)
    assert error(skinny.skinny_linear(x, weight, plan, gated=gated, residual=added), wanted) < CLOSE
    if gated:
        mixed = interleaved(*weight.chunk(2))
        found = skinny.skinny_linear(x, mixed, plan, gated=True, interleaved=True, residual=added)
        assert error(found, wanted) < CLOSE


@pytest.mark.parametrize("heads", [(4, 2, 32), (8, 8, 64), (4, 1, 128)])
@pytest.mark.parametrize("rows", skinny.ATTENTION_ROWS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_few_tokens_keeps_texts_apart(
    heads: tuple[int, int, int], rows: int, causal: bool
) -> None:
    q_heads, kv_heads, dim = heads
    qkv = random(rows, (q_heads + 2 * kv_heads) * dim)
    kept = qkv.clone()
    lengths = [3, 1, 7] + [1] * (rows - 11)  # and a tail of filler, each token by itself
    positions = torch.cat([torch.arange(n) for n in lengths]).int().to(DEVICE)
    angles = random(64, dim // 2, dtype=torch.float32)
    rotation = (angles.cos(), angles.sin())
    weights = (1 + 0.1 * random(dim), 1 + 0.1 * random(dim))
    asked = (qkv, positions, rotation, weights, (q_heads, kv_heads), 1e-6)
    found = skinny.skinny_attention(*asked, causal=causal)
    assert error(found, skinny.skinny_attention_reference(*asked, causal=causal)) < CLOSE
    assert torch.equal(qkv, kept)
