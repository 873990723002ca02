"""A model that does not fit the GPU is refused before its weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedq_consumer.engine import ModelError, load_encoder
from tests.helpers.tiny_models import make_tiny_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_a_full_gpu_refuses_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tiny_qwen3(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    monkeypatch.setattr("embedq_consumer.engine.loading.loader._load_model", _never)
    with pytest.raises(ModelError, match=r"activations of 16,384 tokens; cuda.* free of 24\.0$"):
        load_encoder(path, device="cuda")


def _never(*_: object) -> None:
    raise AssertionError("weights were read")
