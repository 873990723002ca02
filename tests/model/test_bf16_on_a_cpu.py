"""`quantization="bf16"`: what an operator of a processor with instructions for it may choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq_consumer.engine import Encoder, ModelError, Text, load_encoder
from embedq_consumer.engine.kernels import cpu_products, onnx_rows
from embedq_consumer.engine.kernels.cpu_products import FEW_TOKENS
from embedq_consumer.engine.models import bert_cpu, registry
from tests.helpers.encoders import normalized, tokens_of
from tests.helpers.tiny_models import (
    make_tiny_bert,
    make_tiny_deberta,
    make_tiny_gemma3,
    make_tiny_modernbert,
    make_tiny_mpnet,
    make_tiny_qwen3,
    make_tiny_t5,
    make_tiny_xlm_roberta,
    minilm_path,
)

TEXTS = [
    "The moon is round.",
    "a",
    "北京是中国的首都。 Москва слезам не верит. über den Fluß",
    "The capital of China is Beijing, and gravity attracts two bodies towards each other. " * 3,
    "stone wall " * 40,
]
MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": make_tiny_bert,
    "mpnet": make_tiny_mpnet,
    "deberta": make_tiny_deberta,
    "qwen3": make_tiny_qwen3,
    "xlm-roberta": make_tiny_xlm_roberta,
    "modernbert": make_tiny_modernbert,
    "gemma3": make_tiny_gemma3,
    "t5": make_tiny_t5,
}
FAR = 0.02
"""What rounding may take from a cosine of these random models; trained ones lose less."""


def cosines(found: Encoder, wanted: Encoder, texts: list[str]) -> Any:
    cut = [Text(text, truncate="end") for text in texts]
    vectors = (normalized(each.encode(tokens_of(each, cut))) for each in (found, wanted))
    return np.sum(np.multiply(*vectors), axis=1)


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder(minilm_path(), device="cpu", quantization="bf16")


@pytest.mark.parametrize("repeated", [1, 20])
def test_minilm_gives_what_sentence_transformers_gives_but_for_the_rounding(
    minilm: Encoder, reference_of: Callable[[str], Any], repeated: int
) -> None:
    """Few tokens, and so many that they run in parts."""
    texts = TEXTS * repeated
    found = normalized(minilm.encode(tokens_of(minilm, [Text(text, truncate="end") for text in texts])))
    expected = normalized(reference_of("minilm").encode(texts))
    assert np.sum(found * expected, axis=1).min() >= 0.9998
    assert np.abs(found - expected).max() <= 4e-3


def test_a_text_gets_the_same_vector_in_a_row_of_few_tokens_and_of_many(minilm: Encoder) -> None:
    few, *many = tokens_of(minilm, [TEXTS[0], *TEXTS[2:] * 3])
    assert len(few) < FEW_TOKENS < sum(map(len, many))
    alone, among = (normalized(minilm.encode(batch))[0] for batch in ([few], [few, *many]))
    assert alone @ among >= 0.9999


def test_a_short_text_alone_is_not_rounded_where_onnx_runtime_serves_and_a_load_proves_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    path = make_tiny_bert(tmp_path)
    exact, rounded = (load_encoder(path, device="cpu", quantization=how) for how in ("none", "bf16"))
    assert rounded.kernels["few_rows"] == "onnxruntime"
    short, long = tokens_of(exact, ["a", TEXTS[3]])
    for text, same in ((short, True), (long, False)):
        difference = np.abs(normalized(rounded.encode([text])) - normalized(exact.encode([text]))).max()
        assert bool(difference <= 1e-6) is same
    right = onnx_rows.OnnxBert.__call__
    monkeypatch.setattr(
        onnx_rows.OnnxBert, "__call__", lambda self, ids, *rest: right(self, ids.flip(0).contiguous(), *rest)
    )
    with pytest.raises(ModelError, match="do not give the same"):
        load_encoder(path, device="cpu", quantization="bf16")


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_model_runs_and_says_in_its_version_how(name: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path)
    exact, rounded = (load_encoder(path, device="cpu", quantization=how) for how in ("none", "bf16"))
    found = cosines(rounded, exact, TEXTS)
    assert found.min() >= 1 - FAR
    assert (found < 1).any(), "nothing was rounded"
    assert rounded.model_version != exact.model_version
    assert rounded.weight_bytes * 2 == exact.weight_bytes


def test_weights_in_float32_are_given_up_where_they_are_not_multiplied_with(tmp_path: Path) -> None:
    encoder: Any = load_encoder(make_tiny_bert(tmp_path), device="cpu", quantization="bf16")
    model = encoder._model
    held = {parameter.ndim for parameter in model.encoder.layer.parameters() if parameter.numel()}
    assert held == {1}, "norms and biases alone"


def test_rotary_frequencies_stay_in_float32(tmp_path: Path) -> None:
    encoder: Any = load_encoder(make_tiny_qwen3(tmp_path), device="cpu", quantization="bf16")
    model = encoder._model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_processor_without_such_instructions_gives_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_bert(tmp_path)
    packed = load_encoder(path, device="cpu", quantization="bf16")
    monkeypatch.setattr(bert_cpu, "fast_bf16", lambda _: False)
    plain = load_encoder(path, device="cpu", quantization="bf16")
    assert plain.kernels["products"] == "bf16_plain"
    assert plain.model_version == packed.model_version
    assert cosines(plain, packed, TEXTS).min() >= 0.9999


def test_what_transformers_said_of_a_model_serves_both_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known = make_tiny_bert(tmp_path / "model"), tmp_path / "known"
    load_encoder(path, device="cpu", known_models=known)

    def asked(*_: Any) -> None:
        raise AssertionError("transformers was asked once more")

    monkeypatch.setattr("embedq_consumer.engine.loading.loader._from_transformers", asked)
    load_encoder(path, device="cpu", known_models=known, quantization="bf16")


def test_a_gpu_has_no_use_for_it() -> None:
    with pytest.raises(
        ModelError, match="quantization bf16: expected none: on a GPU every model runs in bf16"
    ):
        registry.refuse("bf16", torch.device("cuda", 0))


def test_no_layer_can_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="keep_bf16: needs quantization fp8"):
        load_encoder(make_tiny_bert(tmp_path), device="cpu", quantization="bf16", keep_bf16=(0,))


def test_a_load_proves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_products.Bf16Products.added
    monkeypatch.setattr(
        cpu_products.Bf16Products, "added", lambda self, x, *rest: right(self, x.flip(0), *rest)
    )
    with pytest.raises(ModelError, match="do not give the same"):
        load_encoder(make_tiny_bert(tmp_path), device="cpu", quantization="bf16")
