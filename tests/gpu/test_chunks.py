"""Spans on CUDA, where most texts run as graphs and those with spans do not, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import Encoder, Quantization, Tokens, load_encoder
from tests.helpers.encoders import normalized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LEAST: dict[str, float] = {"qwen3": 0.9995, "qwen3-fp8": 0.99, "minilm": 0.9995}


def mixed(vocabulary: int, longest: int) -> list[Tokens]:
    """Texts with spans and without, of many lengths, in one batch."""
    random = np.random.default_rng(1)
    batch = []
    for n, length in enumerate([3, 40, 64, 129, 300, 511, 5, 5, 17, 400]):
        ids = random.integers(3, vocabulary, min(length, longest)).astype(np.int32)
        cuts = [1, *range(2, len(ids) - 1, 23)[1:], len(ids)]
        spans = tuple(pairwise(cuts)) if n % 2 else ()
        batch.append(Tokens(ids, spans=spans))
    return batch


@pytest.fixture(scope="module", params=["qwen3", "qwen3-fp8", "minilm"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]) -> Path:
    return model_path(name) if name == "minilm" else make(tmp_path_factory.mktemp("shape"), "tiny")


@pytest.fixture(scope="module")
def batch(name: str) -> list[Tokens]:
    return mixed(30_000 if name == "minilm" else SHAPES["tiny"]["vocabulary"], 256)


@pytest.fixture(scope="module")
def encoder(path: Path, name: str) -> Encoder:
    quantization: Quantization = "fp8" if name.endswith("fp8") else "none"
    return load_encoder(path, device="cuda", quantization=quantization)


def vectors_of(encoder: Encoder, batch: list[Tokens]) -> npt.NDArray[np.float32]:
    return encoder.submit(batch).result()


def test_spans_among_plain_texts_are_those_of_float32_on_the_cpu(
    encoder: Encoder, path: Path, batch: list[Tokens], name: str
) -> None:
    expected = normalized(vectors_of(load_encoder(path, device="cpu"), batch))
    found = normalized(vectors_of(encoder, batch))
    assert found.shape == expected.shape
    assert (found * expected).sum(axis=1).min() >= LEAST[name]


def test_submits_overlap_and_each_keeps_its_own_rows(encoder: Encoder, batch: list[Tokens]) -> None:
    alone = [normalized(vectors_of(encoder, [tokens])) for tokens in batch]
    pending = [encoder.submit(batch[start:] + batch[:start]) for start in range(len(batch))]
    for start, waiting in enumerate(pending):
        wanted = np.concatenate(alone[start:] + alone[:start])
        assert (normalized(waiting.result()) * wanted).sum(axis=1).min() >= 0.998


def test_a_deterministic_span_has_the_same_bits_alone_and_among_others(
    path: Path, batch: list[Tokens]
) -> None:
    encoder = load_encoder(path, device="cuda", deterministic=True)
    together = vectors_of(encoder, batch)
    assert np.array_equal(together, np.concatenate([vectors_of(encoder, [tokens]) for tokens in batch]))
