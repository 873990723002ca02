"""Encoders under test, and sentence-transformers on the same directories, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.engine import Encoder, Text, Tokens, load_encoder
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, minilm_path

MODELS = ["minilm", "qwen3", "bert-cls", "bert-mean"]
FEW_ROWS = "onnxruntime" if find_spec("onnx") and find_spec("onnxruntime") else "packed"
"""What runs few tokens of a BERT on a CPU here."""

Vectors = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one of MODELS, made once."""
    made: dict[str, Path] = {}
    makers: dict[str, Callable[[Path], Path]] = {
        "minilm": lambda _: minilm_path(),
        "qwen3": lambda path: make_tiny_qwen3(path, max_tokens=512),
        "bert-cls": lambda path: make_tiny_bert(path, pooling="cls"),
        "bert-mean": lambda path: make_tiny_bert(path, pooling="mean"),
    }

    def path_of(name: str) -> Path:
        if name not in made:
            made[name] = makers[name](tmp_path_factory.mktemp("models") / name)
        return made[name]

    return path_of


@pytest.fixture(scope="session")
def encoder_of(model_path: Callable[[str], Path]) -> Callable[[str], Encoder]:
    loaded: dict[str, Encoder] = {}

    def encoder(name: str) -> Encoder:
        if name not in loaded:
            loaded[name] = load_encoder(model_path(name), device="cpu")
        return loaded[name]

    return encoder


@pytest.fixture(scope="session")
def reference_of(model_path: Callable[[str], Path]) -> Callable[[str], Any]:
    """sentence-transformers' own model of the same directory."""
    from sentence_transformers import SentenceTransformer

    loaded: dict[str, Any] = {}

    def reference(name: str) -> Any:
        if name not in loaded:
            loaded[name] = SentenceTransformer(str(model_path(name)), device="cpu", local_files_only=True)
        return loaded[name]

    return reference


def tokens_of(encoder: Encoder, texts: Sequence[str | Text]) -> list[npt.NDArray[np.int32]]:
    """Ids of texts that all fit or are cut."""
    found = encoder.tokenize([Text(text) if isinstance(text, str) else text for text in texts])
    assert all(isinstance(tokens, Tokens) for tokens in found), found
    return [tokens.ids for tokens in found if isinstance(tokens, Tokens)]


def normalized(vectors: Vectors, dimensions: int | None = None) -> Vectors:
    """Cut, then normalize."""
    cut = vectors[:, :dimensions]
    unit: Vectors = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return unit
