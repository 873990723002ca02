"""The deterministic mode on the CPU; tests/gpu/test_prefix.py shows it on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from tests.model.test_parity import TEXTS

MODELS = ["minilm", "qwen3", "bert-cls"]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Path:
    return model_path(request.param)


@pytest.fixture(scope="module")
def encoder(path: Path) -> Encoder:
    return load_encoder(path, device="cpu", deterministic=True)


def test_vectors_are_the_same_bits_whatever_else_is_in_the_batch(encoder: Encoder) -> None:
    texts = [Text(text, truncate="end") for text in (*TEXTS, "stone wall " * 40)]
    found = [tokens for tokens in encoder.tokenize(texts) if isinstance(tokens, Tokens)]
    assert len(found) == len(texts)
    alone = np.concatenate([encoder.submit([tokens]).result() for tokens in found])
    random = np.random.default_rng(0)
    for _ in range(4):
        order = random.permutation(len(found)).tolist()
        together = encoder.submit([found[i] for i in order]).result()
        assert np.array_equal(together, alone[order])


def test_the_mode_has_a_version_of_its_own(path: Path, encoder: Encoder) -> None:
    assert encoder.model_version != load_encoder(path, device="cpu").model_version
