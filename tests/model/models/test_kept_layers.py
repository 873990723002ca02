"""Which layers FP8 leaves in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq_consumer.engine import LoadOptions, ModelError, load_encoder
from embedq_consumer.engine.loading.loader import kept_layers
from embedq_consumer.engine.loading.model_version import model_version
from embedq_consumer.engine.model_directory import ModelDirectory, read_directory
from tests.helpers.tiny_models import make_tiny_bert


@pytest.fixture
def directory(tmp_path: Path) -> ModelDirectory:
    return read_directory(make_tiny_bert(tmp_path / "bert", layers=6))


def test_negative_numbers_count_from_the_end(directory: ModelDirectory) -> None:
    assert kept_layers((0, -1, 5, 2), directory, "fp8") == (0, 2, 5)
    assert kept_layers((), directory, "fp8") == kept_layers((), directory, "none") == ()


@pytest.mark.parametrize("number", [6, -7])
def test_a_layer_that_the_model_lacks_is_refused(directory: ModelDirectory, number: int) -> None:
    with pytest.raises(ModelError, match=f"the model, which has 6, got {number}$"):
        kept_layers((0, number), directory, "fp8")


def test_without_quantization_there_is_nothing_to_keep(directory: ModelDirectory) -> None:
    with pytest.raises(ModelError, match="needs quantization"):
        load_encoder(directory.root, device="cpu", keep_bf16=(0,))


def test_kept_layers_make_another_version_in_whatever_order_they_are_named(
    directory: ModelDirectory,
) -> None:
    def version(*numbers: int) -> str:
        kept = kept_layers(numbers, directory, "fp8")
        return model_version(
            directory, LoadOptions(quantization="fp8", keep_bf16=kept), tokenizer="", max_tokens=128
        )

    assert version(0, -1) == version(5, 0)
    assert len({version(), version(0), version(0, 5)}) == 3
