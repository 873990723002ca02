"""Quantized checkpoints on CUDA, where their packages' own kernels run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedq_consumer.engine import Text, load_encoder
from tests.helpers.encoders import normalized, tokens_of
from tests.model.loading.test_quantized_checkpoints import METHODS, installed, quantize
from tests.model.test_parity import TEXTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if not installed(METHODS[found][0]):
        pytest.skip(f"{METHODS[found][0]} is not installed")
    return found


@pytest.mark.filterwarnings("ignore")
def test_on_cuda_it_is_close_to_the_values_that_it_stands_for(tmp_path: Path, method: str) -> None:
    path, plain = quantize(tmp_path, method)
    quantized, expected = load_encoder(path, device="cuda"), load_encoder(plain, device="cpu")
    ids = tokens_of(expected, [Text(text, truncate="end") for text in TEXTS])
    cosines = (normalized(quantized.encode(ids)) * normalized(expected.encode(ids))).sum(axis=1)
    assert cosines.min() >= 0.999
