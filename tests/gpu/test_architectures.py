"""Architectures beyond BERT and Qwen3 on CUDA: bf16 against float32 on the CPU, windows in the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedq_consumer.engine import Text, load_encoder
from embedq_consumer.engine.kernels.attention import Packing, attend_runs, cuda_kernel
from embedq_consumer.engine.pooling import POOLINGS
from tests.helpers.architectures import LONG_TEXTS, MAKERS
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("name", MAKERS)
def test_bf16_on_cuda_is_close_to_float32_on_the_cpu(tmp_path: Path, name: str) -> None:
    path = MAKERS[name](tmp_path)
    encoder = load_encoder(path, device="cpu")
    cuda = load_encoder(path, device="cuda")
    assert cuda.model_version == encoder.model_version
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in LONG_TEXTS])
    wanted, vectors = normalized(encoder.encode(ids)), normalized(cuda.encode(ids))
    assert (wanted * vectors).sum(axis=1).min() >= 0.999
    alone = np.concatenate([normalized(cuda.encode([i])) for i in ids])
    assert (vectors * alone).sum(axis=1).min() >= 0.9999


def test_every_pooling_in_cuda_graphs_is_that_of_the_cpu(tmp_path: Path) -> None:
    path = make_tiny_bert(tmp_path, pooling=list(POOLINGS))
    encoder = load_encoder(path, device="cpu")
    cuda = load_encoder(path, device="cuda")
    assert cuda.hidden_size == encoder.hidden_size == len(POOLINGS) * 128
    ids = tokens_of(encoder, [Text(text, truncate="end") for text in LONG_TEXTS])
    wanted, vectors = encoder.encode(ids), cuda.encode(ids)
    for part, (one, other) in enumerate(
        zip(np.split(wanted, 6, axis=1), np.split(vectors, 6, axis=1), strict=True)
    ):
        assert (normalized(one) * normalized(other)).sum(axis=1).min() >= 0.999, part


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 65, 257])
def test_a_kernel_with_a_window_is_attention_by_bands(window: int, causal: bool) -> None:
    device = torch.device("cuda", 0)
    lengths = [1, window, window + 1, 700, 3, 1500]
    q, k, v = (torch.randn(sum(lengths), n, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2))
    packing = Packing.of(lengths, device)
    kernel = cuda_kernel(4, 2, 64, causal, torch.bfloat16, device, window)
    found = kernel(q, k, v, packing.cu_seqlens, packing.longest, 0.125)
    expected = torch.empty(q.shape, device=device)
    attend_runs(
        q.float(), k.float(), v.float(), expected, packing.runs, causal=causal, scale=0.125, window=window
    )
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
