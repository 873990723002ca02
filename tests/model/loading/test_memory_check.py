"""A model that is too large is refused before its weights are read, with the arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.loading.memory_check import (
    DeviceMemory,
    MemoryEstimate,
    estimate_of,
    refuse_if_too_large,
)
from embedq_consumer.engine.model_directory import read_directory
from embedq_consumer.engine.safety.headers import TensorSlice
from tests.helpers.tiny_models import make_tiny_qwen3

FILE = Path("model.safetensors")
CONFIG = {
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
}


def tensor(name: str, *shape: int, dtype: str = "BF16", size: int = 0) -> TensorSlice:
    return TensorSlice(name=name, dtype=dtype, shape=shape, file=FILE, begin=0, end=size)


def shape_of_4b() -> list[TensorSlice]:
    tensors = [tensor("embed_tokens.weight", 151665, 2560), tensor("norm.weight", 2560)]
    for layer in range(36):
        for part, rows, columns in (
            ("self_attn.q_proj", 4096, 2560),
            ("self_attn.k_proj", 1024, 2560),
            ("self_attn.v_proj", 1024, 2560),
            ("self_attn.o_proj", 2560, 4096),
            ("mlp.gate_proj", 9728, 2560),
            ("mlp.up_proj", 9728, 2560),
            ("mlp.down_proj", 2560, 9728),
        ):
            tensors.append(tensor(f"layers.{layer}.{part}.weight", rows, columns))
        tensors += [tensor(f"layers.{layer}.{norm}.weight", 2560) for norm in ("input_layernorm", "post")]
        tensors += [tensor(f"layers.{layer}.self_attn.{norm}.weight", 128) for norm in ("q_norm", "k_norm")]
    return tensors


def need(*, quantized: bool = False) -> MemoryEstimate:
    return estimate_of(shape_of_4b(), CONFIG, dtype="bf16", quantization="fp8" if quantized else "none")


def test_bf16_takes_two_bytes_a_parameter() -> None:
    found = need()
    assert found.parameters == 4_021_774_336
    assert found.weights == found.loading == 2 * found.parameters


def test_fp8_takes_one_byte_for_each_number_of_a_product_and_first_bf16_for_all() -> None:
    found = need(quantized=True)
    products, rows = 36 * 100_925_440, 36 * (4096 + 1024 + 1024 + 2560 + 9728 + 9728 + 2560)
    assert found.weights == 2 * found.parameters - products + 4 * rows
    assert found.loading == 2 * found.parameters


def test_bf16_on_a_cpu_takes_two_bytes_a_parameter_and_first_four() -> None:
    found = estimate_of(shape_of_4b(), CONFIG, dtype="float32", quantization="bf16")
    assert (found.weights, found.loading) == (2 * found.parameters, 4 * found.parameters)


def test_activations_are_those_of_what_runs_at_once() -> None:
    found = need()
    assert found.tokens == 16_384
    assert found.activations == 16_384 * 2 * (3 * 2560 + 3 * 9728)


def test_heads_that_are_not_run_do_not_count() -> None:
    assert estimate_of(
        [tensor("lm_head.weight", 1000, 10), tensor("cls.predictions.bias", 1000)],
        {},
        dtype="bf16",
        quantization="none",
    ) == MemoryEstimate(parameters=0, dtype="bf16", weights=0, loading=0, activations=0, tokens=16_384)


def test_integers_of_a_quantized_checkpoint_count_as_they_lie_in_the_file() -> None:
    tensors = [
        tensor("layers.0.qweight", 100, 8, dtype="I32", size=3200),
        tensor("norm.weight", 8, dtype="F32"),
    ]
    found = estimate_of(tensors, {}, dtype="bf16", quantization="none")
    assert (found.parameters, found.weights) == (8, 3200 + 16)


def test_what_fits_is_not_refused() -> None:
    found = need()
    refuse_if_too_large("model", found, DeviceMemory(device="cuda:0", free=found.total, total=24 * 10**9))
    with pytest.raises(ModelError):
        refuse_if_too_large(
            "model", found, DeviceMemory(device="cuda:0", free=found.total - 1, total=24 * 10**9)
        )


def test_the_message_gives_the_arithmetic() -> None:
    with pytest.raises(ModelError) as caught:
        refuse_if_too_large(
            "/models/4B/config.json",
            need(),
            DeviceMemory(device="cuda:0", free=9_100_000_000, total=10 * 10**9),
        )
    assert str(caught.value) == (
        "/models/4B/config.json: needs 8.0 GB for weights (4,021,774,336 parameters in bf16) and at least 1.2 GB for "
        "activations of 16,384 tokens; cuda:0 has 9.1 GB free of 10.0"
    )


def test_weights_that_must_pass_through_bf16_are_named_as_such() -> None:
    with pytest.raises(
        ModelError, match=r"needs 8\.0 GB for 4,021,774,336 parameters in bf16, before they are quantized;"
    ):
        refuse_if_too_large(
            "model", need(quantized=True), DeviceMemory(device="cuda:0", free=7 * 10**9, total=8 * 10**9)
        )


def test_a_real_directory_counts_what_it_holds(tmp_path: Path) -> None:
    directory = read_directory(make_tiny_qwen3(tmp_path))
    found = estimate_of(directory.tensors, directory.config, dtype="float32", quantization="none")
    assert found.weights == sum(slice_.end - slice_.begin for slice_ in directory.tensors)
    assert found.activations == 16_384 * 4 * (3 * 256 + max((8 + 4) * 32, 3 * 512))


def test_weights_beyond_the_machines_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_qwen3(tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 1000}.__getitem__)
    monkeypatch.setattr("embedq_consumer.engine.loading.loader._load_model", _never)
    with pytest.raises(ModelError, match=r"parameters in float32\); the machine has 0\.0 GB free of 0\.0$"):
        load_encoder(path, device="cpu")


def _never(*_: object) -> None:
    raise AssertionError("weights were read")
