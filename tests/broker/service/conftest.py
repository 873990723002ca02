"""Models for the tests of the whole service: small ones, so that many replicas fit into two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, minilm_path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root: `a` and `b` differ in their weights, `bert` and `qwen` in everything.

    `a` and `b` are for tests to which any model would do: their forward is written out for the CPU, so that a replica that
    starts need not import transformers, which takes twice as long as all the rest.
    """
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b"), start=1):
        make_tiny_bert(root / name, seed=seed, hidden=256, layers=2, max_tokens=2048)
    make_tiny_bert(root / "bert")
    make_tiny_qwen3(root / "qwen", seed=1)
    return root


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2."""
    return minilm_path()
