"""The forward written for BERT and its kin on CUDA, bf16 and FP8, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedq_consumer.engine import Encoder, Quantization, load_encoder
from tests.helpers.encoders import normalized
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_xlm_roberta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

VOCABULARY = 300
LONGEST = 500
LENGTHS = [1, 2, 3, 17, 40, 64, 65, 127, 128, 129, 300, 5, 500, 5, 5]
LEAST: dict[Quantization, float] = {"none": 0.9995, "fp8": 0.995}

MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert-mean": lambda path: make_tiny_bert(path, pooling="mean", layers=4, max_tokens=LONGEST),
    "bert-cls": lambda path: make_tiny_bert(path, pooling="cls", layers=4, max_tokens=LONGEST),
    "xlm-r-cls": lambda path: make_tiny_xlm_roberta(path, pooling="cls", layers=4, max_tokens=LONGEST),
    "xlm-r-mean": lambda path: make_tiny_xlm_roberta(
        path, pooling="mean", hidden=384, layers=3, max_tokens=LONGEST
    ),
    "bert-long": lambda path: make_tiny_bert(path, pooling="mean", max_tokens=4096),
}

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]


def texts_of(lengths: list[int]) -> list[Ids]:
    random = np.random.default_rng(1)
    return [random.integers(5, VOCABULARY, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["none", "fp8"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    found: Quantization = request.param
    return found


@pytest.fixture(scope="module")
def encoder(path: Path, quantization: Quantization) -> Encoder:
    return load_encoder(path, device="cuda", quantization=quantization)


@pytest.fixture(scope="module")
def expected(path: Path) -> Vectors:
    return normalized(load_encoder(path, device="cpu").encode(texts_of(LENGTHS)))


def cosines(vectors: Vectors, wanted: Vectors) -> Vectors:
    found: Vectors = (normalized(vectors) * wanted).sum(axis=1)
    return found


def test_the_forward_is_the_one_written_out_and_runs_in_graphs(encoder: Any) -> None:
    assert type(encoder._forward).__name__ == "PackedBertCuda"
    assert encoder._graphs is not None


def test_packed_vectors_are_those_of_float32_on_the_cpu(
    encoder: Encoder, expected: Vectors, quantization: Quantization
) -> None:
    assert cosines(encoder.encode(texts_of(LENGTHS)), expected).min() >= LEAST[quantization]


def test_each_text_alone_gives_the_same(
    encoder: Encoder, expected: Vectors, quantization: Quantization
) -> None:
    vectors = np.concatenate([encoder.encode([ids]) for ids in texts_of(LENGTHS)])
    assert cosines(vectors, expected).min() >= LEAST[quantization]


def test_no_position_in_a_micro_batch_changes_a_vector(encoder: Encoder, quantization: Quantization) -> None:
    texts = texts_of(LENGTHS)
    text = texts[4]
    alone = normalized(encoder.encode([text]))
    for position in range(len(texts) + 1):
        batch = [*texts[:position], text, *texts[position:]]
        found = cosines(encoder.encode(batch)[position : position + 1], alone)
        assert found.min() >= (0.9999 if quantization == "none" else LEAST["fp8"]), position


def test_batches_of_every_size(encoder: Encoder, quantization: Quantization) -> None:
    texts = texts_of([*LENGTHS * 30, 0])
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), encoder.hidden_size)
    assert not vectors[-1].any()
    again = np.concatenate([encoder.encode([ids]) for ids in texts[:40]])
    assert cosines(again, normalized(vectors[:40])).min() >= LEAST[quantization]
    count = 1
    while count < 400:
        some = encoder.encode(texts[:count])
        assert cosines(some, normalized(vectors[:count])).min() >= LEAST[quantization], count
        count = count * 3 // 2 + 1


def test_a_text_that_is_not_finite_fails_alone(
    path: Path, tmp_path: Path, quantization: Quantization
) -> None:
    from safetensors.torch import load_file, save_file

    broken = copytree(path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][1] = float(
        "nan"
    )  # not among the tokens that a load is proved on
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(broken, device="cuda", quantization=quantization)
    texts = texts_of(LENGTHS)
    texts[6][3] = 1
    finite = np.isfinite(encoder.encode(texts)).all(axis=1)
    assert finite.tolist() == [n != 6 for n in range(len(texts))]


def test_quantized_vectors_have_a_version_of_their_own(
    path: Path, encoder: Encoder, quantization: Quantization
) -> None:
    plain = load_encoder(path, device="cpu").model_version
    assert (encoder.model_version == plain) == (quantization == "none")


def test_closing_frees_the_memory_of_the_device(path: Path, quantization: Quantization) -> None:
    load_encoder(path, device="cuda", quantization=quantization).close()
    before = torch.cuda.memory_allocated()
    encoder = load_encoder(path, device="cuda", quantization=quantization)
    assert torch.cuda.memory_allocated() > before
    encoder.close()
    del encoder
    assert torch.cuda.memory_allocated() <= before
