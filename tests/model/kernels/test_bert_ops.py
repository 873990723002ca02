"""BERT's Triton kernels against their definitions: on the GPU where there is one, in Triton's interpreter otherwise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.kernels import bert_ops as kernels
from tests.model.kernels.test_fused_ops import BF16, DEVICE, FP8, error, random, values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's overflow, in the interpreter

EPS = 1e-12


def norm_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + 0.1 * random(width), 0.1 * random(1, width)[0]


@pytest.mark.parametrize("width", [96, 384, 1024, 2560])
@pytest.mark.parametrize("tokens", [1, 7])
def test_embeddings_are_words_and_positions_normalized(width: int, tokens: int) -> None:
    words, table = random(50, width), random(20, width, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids, positions = (
        torch.randint(0, n, (tokens,), generator=generator, dtype=torch.int32).to(DEVICE) for n in (50, 20)
    )
    wanted = kernels.embed_reference(ids, positions, words, table, norm_of(width), EPS)
    found, scaled = kernels.embed(ids, positions, words, table, norm_of(width), EPS, quantized=True)
    assert scaled is not None
    assert error(found, wanted) < BF16
    assert error(values(scaled), wanted) < FP8
    plain, nothing = kernels.embed(ids, positions, words, table, norm_of(width), EPS)
    assert nothing is None
    assert torch.equal(plain, found)


@pytest.mark.parametrize("width", [96, 384, 1024, 2560])
@pytest.mark.parametrize("rows", [1, 6])
def test_layer_norm_of_a_sum(width: int, rows: int) -> None:
    x, y, bias = random(rows, width), 3 * random(rows + 1, width)[:rows], random(width)
    wanted = kernels.add_layer_norm_reference(x, y, bias, norm_of(width), EPS)
    found, scaled = kernels.add_layer_norm(x, y, bias, norm_of(width), EPS, quantized=True)
    assert scaled is not None
    assert error(found, wanted) < BF16
    assert error(values(scaled), wanted) < FP8
    out = torch.empty(rows, width, device=DEVICE)
    assert kernels.add_layer_norm(x, y, bias, norm_of(width), EPS, out=out)[0] is out
    assert error(out, wanted) < 1e-5


def test_layer_norm_of_a_row_far_from_zero_loses_nothing() -> None:
    x = 1000 + random(4, 384, dtype=torch.float32)
    nothing = torch.zeros_like(x)
    wanted = kernels.add_layer_norm_reference(x, nothing, nothing[0], norm_of(384), EPS)
    found, _ = kernels.add_layer_norm(x, nothing, nothing[0], norm_of(384), EPS)
    assert error(found, wanted) < 1e-3


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("width", [96, 1536, 4096])
def test_activation(width: int, tanh: bool) -> None:
    x, bias = 2 * random(3, width), random(width)
    wanted = kernels.bias_gelu_reference(x, bias, tanh=tanh)
    assert error(values(kernels.bias_gelu(x, bias, tanh=tanh)), wanted) < BF16
    assert error(values(kernels.bias_gelu(x, bias, tanh=tanh, quantized=True)), wanted) < FP8


@pytest.mark.parametrize("tanh", [False, True])
def test_activation_of_large_numbers_is_finite(tanh: bool) -> None:
    x = torch.tensor([[-300.0, 300.0, 0.0, -9.0] * 8], dtype=torch.bfloat16, device=DEVICE)
    bias = torch.zeros(32, dtype=torch.bfloat16, device=DEVICE)
    wanted = kernels.bias_gelu_reference(x, bias, tanh=tanh)
    for quantized in (False, True):
        found = values(kernels.bias_gelu(x, bias, tanh=tanh, quantized=quantized))
        assert torch.allclose(found.float(), wanted, atol=1e-3)


def test_a_row_of_garbage_stays_by_itself() -> None:
    x = random(6, 384)
    x[2] = float("nan")
    found, scaled = kernels.add_layer_norm(x, x, x[0], norm_of(384), EPS, quantized=True)
    assert scaled is not None
    good = [row for row in range(6) if row != 2]
    assert found[good].isfinite().all()
    assert values(scaled)[good].isfinite().all()
    assert values(kernels.bias_gelu(x, x[0], tanh=False, quantized=True))[good].isfinite().all()


@pytest.mark.parametrize("width", [96, 384])
def test_mean_over_each_text(width: int) -> None:
    x = random(120, width, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 1, 8, 72, 120, 120, 120], dtype=torch.int32, device=DEVICE)
    out = torch.full((6, width), float("nan"), device=DEVICE)
    kernels.mean_of_slots(x, cu_seqlens, out)
    assert torch.allclose(out, kernels.mean_of_slots_reference(x, cu_seqlens), atol=1e-6)
    assert not out[4:].any()


def test_the_mean_of_a_text_is_bit_equal_wherever_it_lies() -> None:
    text = random(70, 96, dtype=torch.float32)
    means = []
    for before in (0, 3, 50):
        row = torch.cat([random(before, 96, dtype=torch.float32), text, text])
        cu_seqlens = torch.tensor([0, before, before + 70, len(row)], dtype=torch.int32, device=DEVICE)
        out = torch.empty(3, 96, device=DEVICE)
        kernels.mean_of_slots(row, cu_seqlens, out)
        means.append(out[1])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
