"""Models for the tests of the whole service: small ones, so that many replicas fit into two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, minilm_path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root: `qwen-a` and `qwen-b` differ in their weights, `bert` in everything."""
    root = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(root / "qwen-a", seed=1)
    make_tiny_qwen3(root / "qwen-b", seed=2)
    make_tiny_bert(root / "bert")
    return root


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2."""
    return minilm_path()
