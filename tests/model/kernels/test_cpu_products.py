"""Products of few tokens with weights that were laid out once, against the same products without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.kernels import cpu_products, onnx_rows
from tests.helpers.encoders import normalized
from tests.helpers.tiny_models import make_tiny_bert

Row = list[np.ndarray]


@pytest.fixture(autouse=True)
def without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise ImportError

    monkeypatch.setattr(onnx_rows.OnnxBert, "__init__", missing)


def row(*lengths: int) -> Row:
    random = np.random.default_rng(0)
    return [random.integers(1, 300, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("tokens", [1, 7, cpu_products.FEW_TOKENS])
def test_a_packed_product_is_the_plain_one(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((tokens, 48), (40, 48), (40,)))
    found = cpu_products.packed_linear(x, cpu_products.packed(weight), bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def layer_of(width: int, inner: int, generator: torch.Generator) -> list[cpu_products.Pair]:
    """The products of a feed-forward network."""
    return [
        (
            torch.randn(shape, generator=generator) / shape[1] ** 0.5,
            torch.randn(shape[0], generator=generator),
        )
        for shape in ((inner, width), (width, inner))
    ]


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("kind", ["packed", "bf16 packed", "bf16 plain"])
def test_each_kind_of_products_computes_what_the_plain_one_does(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu_products, "_FRESH_BYTES", 50 * 96 * 2
    )  # bytes of fifty rows: 300 run in six parts
    generator = torch.Generator().manual_seed(tokens)
    x, up, down = torch.randn(tokens, 32, generator=generator), *layer_of(32, 96, generator)
    made: Callable[[cpu_products.Pair], cpu_products.Pair]
    products: cpu_products.Products
    if kind == "packed":
        products, made = cpu_products.PackedProducts(), lambda pair: (cpu_products.packed(pair[0]), pair[1])
    else:
        packs = kind == "bf16 packed"
        if packs and not cpu_products.fast_bf16(torch.eye(32)):
            pytest.skip("this processor has no such product")
        products, made = (
            cpu_products.Bf16Products(packs=packs),
            lambda pair: cpu_products.rounded(pair, packs=packs),
        )
    plain, tolerance = cpu_products.PlainProducts(), 1e-5 if kind == "packed" else 0.05
    dtype = torch.float32 if kind == "packed" else torch.bfloat16

    def all_of(
        of: cpu_products.Products, up: cpu_products.Pair, down: cpu_products.Pair, dtype: Any
    ) -> list[Any]:
        wide, narrow = (torch.empty(tokens, width, dtype=dtype) for width in (96, 32))
        linear = torch.empty(tokens, 96, dtype=dtype)
        of.linear(x, up, linear)
        added = of.added(linear.clone(), down, x.clone(), narrow)
        return [linear, added.clone(), of.feed_forward(x.clone(), up, down, wide, narrow).clone()]

    found = all_of(products, made(up), made(down), dtype)
    expected = all_of(plain, up, down, torch.float32)
    for name, ours, theirs in zip(("linear", "added", "feed_forward"), found, expected, strict=True):
        difference = (ours.float() - theirs).abs().max().item()
        assert difference <= tolerance, name
    assert found[1].dtype == found[2].dtype == torch.float32, "sums are not rounded"


def test_what_is_not_float32_or_not_a_number_or_too_much_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(8, 8)
    assert cpu_products.packable([weight])
    assert not cpu_products.packable([weight.bfloat16()])
    assert not cpu_products.packable([weight * torch.nan])
    monkeypatch.setattr(cpu_products, "PACKED_BYTES", 2 * weight.nbytes)
    assert cpu_products.packable([weight, weight])
    assert not cpu_products.packable([weight, weight, weight])


def test_texts_of_few_tokens_and_of_many_get_the_vectors_that_a_model_without_copies_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_bert(tmp_path, max_tokens=128)
    packed = load_encoder(path, device="cpu")
    monkeypatch.setattr(cpu_products, "PACKED_BYTES", 0)
    plain = load_encoder(path, device="cpu")
    assert (packed.kernels["few_rows"], plain.kernels["few_rows"]) == ("packed", "plain")
    for batch in (row(16), row(3, 9, 3), row(cpu_products.FEW_TOKENS), row(100, 40)):
        difference = np.abs(normalized(packed.encode(batch)) - normalized(plain.encode(batch)))
        assert difference.max() <= 1e-6


@pytest.mark.parametrize("broken", [cpu_products.PlainProducts, cpu_products.PackedProducts])
def test_a_load_proves_both_ways_to_multiply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: type[cpu_products.PlainProducts]
) -> None:
    path = make_tiny_bert(tmp_path)
    right = broken.linear
    monkeypatch.setattr(broken, "linear", lambda self, x, *rest: right(self, x.flip(0), *rest))
    with pytest.raises(ModelError, match="do not give the same"):
        load_encoder(path, device="cpu")
