"""The forward written for Qwen3 on CUDA, bf16 and FP8, against float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.qwen3_shapes import SHAPES, make
from embedq_consumer.engine import Encoder, Quantization, load_encoder
from tests.helpers.encoders import normalized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LENGTHS = [1, 2, 3, 17, 40, 64, 65, 127, 128, 129, 300, 511, 1000, 5, 5, 5]
LEAST: dict[Quantization, float] = {"none": 0.9995, "fp8": 0.995}


def texts_of(lengths: list[int]) -> list[npt.NDArray[np.int32]]:
    random = np.random.default_rng(1)
    return [random.integers(3, SHAPES["tiny"]["vocabulary"], n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shape"), "tiny")


@pytest.fixture(scope="module", params=["none", "fp8"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    found: Quantization = request.param
    return found


@pytest.fixture(scope="module")
def encoder(path: Path, quantization: Quantization) -> Encoder:
    return load_encoder(path, device="cuda", quantization=quantization)


@pytest.fixture(scope="module")
def expected(path: Path) -> npt.NDArray[np.float32]:
    return normalized(load_encoder(path, device="cpu").encode(texts_of(LENGTHS)))


def cosines(vectors: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = (normalized(vectors) * wanted).sum(axis=1)
    return found


def test_packed_vectors_are_those_of_float32_on_the_cpu(
    encoder: Encoder, expected: npt.NDArray[np.float32], quantization: Quantization
) -> None:
    found = cosines(encoder.encode(texts_of(LENGTHS)), expected)
    assert found.min() >= LEAST[quantization]


def test_each_text_alone_gives_the_same(
    encoder: Encoder, expected: npt.NDArray[np.float32], quantization: Quantization
) -> None:
    vectors = np.concatenate([encoder.encode([ids]) for ids in texts_of(LENGTHS)])
    found = cosines(vectors, expected)
    assert found.min() >= LEAST[quantization]


def test_no_position_in_a_micro_batch_changes_a_vector(encoder: Encoder, quantization: Quantization) -> None:
    texts = texts_of(LENGTHS)
    text = texts[4]
    alone = normalized(encoder.encode([text]))
    for position in range(len(texts) + 1):
        batch = [*texts[:position], text, *texts[position:]]
        found = cosines(encoder.encode(batch)[position : position + 1], alone)
        assert found.min() >= (0.9999 if quantization == "none" else LEAST["fp8"]), position


def test_batches_of_every_size_and_texts_beyond_the_largest_graph(
    encoder: Encoder, quantization: Quantization
) -> None:
    texts = texts_of([20_000, *LENGTHS * 30, 0])
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), encoder.hidden_size)
    assert not vectors[-1].any()
    again = np.concatenate([encoder.encode([ids]) for ids in texts[:40]])
    assert cosines(again, normalized(vectors[:40])).min() >= LEAST[quantization]


def test_a_text_that_is_not_finite_fails_alone(
    path: Path, tmp_path: Path, quantization: Quantization
) -> None:
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    broken = copytree(path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["embed_tokens.weight"][1] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(broken, device="cuda", quantization=quantization)
    texts = texts_of(LENGTHS)
    texts[6] = texts[6].copy()
    texts[6][3] = 1
    finite = np.isfinite(encoder.encode(texts)).all(axis=1)
    assert finite.tolist() == [n != 6 for n in range(len(texts))]


def test_quantized_vectors_have_a_version_of_their_own(
    path: Path, encoder: Encoder, quantization: Quantization
) -> None:
    plain = load_encoder(path, device="cpu").model_version
    assert (encoder.model_version == plain) == (quantization == "none")
