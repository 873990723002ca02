"""bf16 on CUDA against float32 on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from embedq_consumer.engine import Text, load_encoder
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3
from tests.model.test_parity import TEXTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def make_cls(path: Path) -> Path:
    return make_tiny_bert(path, pooling="cls")


def make_mean(path: Path) -> Path:
    return make_tiny_bert(path, pooling="mean")


@pytest.mark.parametrize("make", [make_tiny_qwen3, make_cls, make_mean])
def test_bf16_on_cuda_is_close_to_float32_on_the_cpu(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    cpu, cuda = (load_encoder(path, device=device) for device in ("cpu", "cuda"))
    assert cpu.model_version == cuda.model_version
    ids = tokens_of(cpu, [Text(text, truncate="end") for text in TEXTS])
    cosines = (normalized(cpu.encode(ids)) * normalized(cuda.encode(ids))).sum(axis=1)
    assert cosines.min() >= 0.999


def test_packed_on_cuda_gives_what_each_text_alone_gives(tmp_path: Path) -> None:
    encoder = load_encoder(make_tiny_qwen3(tmp_path), device="cuda")
    ids = tokens_of(encoder, [*TEXTS, "stone wall " * 2000])
    together = normalized(encoder.encode(ids))
    for n, i in enumerate(ids):
        assert (together[n] * normalized(encoder.encode([i]))[0]).sum() >= 0.9999


def test_closing_frees_the_memory_of_the_device(tmp_path: Path) -> None:
    path = make_tiny_qwen3(tmp_path)
    load_encoder(path, device="cuda").close()
    before = torch.cuda.memory_allocated()
    encoder = load_encoder(path, device="cuda")
    assert torch.cuda.memory_allocated() > before
    encoder.close()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("make", [make_tiny_qwen3, make_cls])
def test_a_model_runs_on_the_second_gpu_from_any_thread(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    first = load_encoder(path, device="cuda:0")
    ids = tokens_of(first, [Text(text, truncate="end") for text in TEXTS])
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(load_encoder, path, device="cuda:1").result()
        vectors = threads.submit(second.encode, ids).result()
    assert (normalized(first.encode(ids)) * normalized(vectors)).sum(axis=1).min() >= 0.9999
