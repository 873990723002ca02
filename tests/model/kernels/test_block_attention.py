"""Attention in tiles of the row against its definition: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.kernels.block_attention import (
    block_attention,
    block_attention_reference,
    bounds_of,
    bounds_reference,
)
from tests.model.kernels.test_fused_ops import DEVICE, error, random

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

LENGTHS = [1, 3, 40, 17, 64, 130, 5, 2, 90]
HEADS = 3
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""The interpreter multiplies no bf16 matrices."""


def cu_of(lengths: list[int], slots: int) -> torch.Tensor:
    """Where slots end; those after the last text are empty."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ends = torch.cat([ends, ends[-1:].repeat(slots - len(lengths))])
    return ends.to(torch.int32).to(DEVICE)


def qkv_of(tokens: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Parts of one row, as one product makes them."""
    return random(tokens, 3 * HEADS * dim, dtype=DTYPE).view(tokens, 3, HEADS, dim).unbind(1)


@pytest.mark.parametrize("slots", [len(LENGTHS), 16, 33])
def test_bounds_are_those_of_each_tokens_text(slots: int) -> None:
    cu_seqlens = cu_of(LENGTHS, slots)
    for count in (sum(LENGTHS), sum(LENGTHS) + 100):
        for found, wanted in zip(
            bounds_of(cu_seqlens, count), bounds_reference(cu_seqlens, count), strict=True
        ):
            assert torch.equal(found, wanted)


def test_a_row_without_texts_has_bounds_all_the_same() -> None:
    begins, ends = bounds_of(torch.zeros(17, dtype=torch.int32, device=DEVICE), 64)
    assert (ends - begins == 1).all()
    assert (begins >= 0).all()
    assert (ends <= 64).all()


@pytest.mark.parametrize("dim", [32, 64])
def test_each_text_sees_itself_alone(dim: int) -> None:
    q, k, v = qkv_of(sum(LENGTHS), dim)
    bounds = bounds_of(cu_of(LENGTHS, 16), len(q))
    found = block_attention(q, k, v, bounds, dim**-0.5)
    assert error(found, block_attention_reference(q, k, v, bounds, dim**-0.5)) < 0.01


def test_one_query_of_each_text_sees_all_of_its_keys() -> None:
    _, k, v = qkv_of(sum(LENGTHS), 32)
    cu_seqlens = cu_of(LENGTHS, 20)
    q = random(20, HEADS * 32, dtype=DTYPE).view(20, HEADS, 32)
    found = block_attention(q, k, v, (cu_seqlens[:-1], cu_seqlens[1:]), 0.2, sparse=True)
    assert error(found, block_attention_reference(q, k, v, (cu_seqlens[:-1], cu_seqlens[1:]), 0.2)) < 0.01
    assert not found[len(LENGTHS) :].any()


def test_few_tokens_take_a_small_tile() -> None:
    q, k, v = qkv_of(9, 32)
    bounds = bounds_of(cu_of([4, 5], 16), 9)
    found = block_attention(q, k, v, bounds, 0.2)
    assert error(found, block_attention_reference(q, k, v, bounds, 0.2)) < 0.01


def test_large_scores_stay_finite() -> None:
    q, k, v = qkv_of(40, 32)
    bounds = bounds_of(cu_of([40], 16), 40)
    found = block_attention(900 * q, k, v, bounds, 1.0)
    assert found.isfinite().all()
    assert error(found, block_attention_reference(900 * q, k, v, bounds, 1.0)) < 0.01
