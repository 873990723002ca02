"""Weights without transformers are those that transformers loads, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from embedq_consumer.engine.loading.load_cache import ModelSnapshot
from embedq_consumer.engine.loading.weights import CheckpointWeights, snapshot_of
from embedq_consumer.engine.model_directory import ModelDirectory, read_directory
from embedq_consumer.engine.models.registry import is_written_out
from embedq_consumer.engine.models.traits import Limits, architecture_of, last_norm_eps_of
from embedq_consumer.engine.text.effective import EffectiveTokenizer
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3, make_tiny_xlm_roberta

MAKERS: dict[str, Callable[[Path], Path]] = {
    "BertModel": make_tiny_bert,
    "Qwen3Model": make_tiny_qwen3,
    "XLMRobertaModel": make_tiny_xlm_roberta,
}


@pytest.fixture(params=MAKERS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> ModelDirectory:
    return read_directory(MAKERS[request.param](tmp_path))


@pytest.fixture
def model(directory: ModelDirectory) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(directory.checkpoint), dtype=torch.float32)


def described(model: Any, directory: ModelDirectory) -> ModelSnapshot | None:
    return snapshot_of(
        model,
        directory,
        Limits(max_tokens=8, position_offset=0),
        tokenizer=EffectiveTokenizer(b"{}"),
        probes=[],
        expected=torch.empty(0),
    )


@pytest.fixture
def weights(directory: ModelDirectory, model: Any) -> CheckpointWeights:
    snapshot = described(model, directory)
    assert snapshot is not None
    return CheckpointWeights(snapshot, directory, torch.device("cpu"))


def test_parameters_have_the_same_names_and_bits(model: Any, weights: CheckpointWeights) -> None:
    wanted = {name: value for name, value in model.named_parameters() if not name.startswith("pooler.")}
    found = dict(weights.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_forward_takes_the_one_where_it_takes_the_other(model: Any, weights: CheckpointWeights) -> None:
    assert architecture_of(weights) == architecture_of(model)
    assert is_written_out(weights) == is_written_out(model) == (architecture_of(model) == "BertModel")
    assert is_written_out(_OnCuda(weights))
    assert is_written_out(_OnCuda(model))


def test_rotary_positions_and_the_last_norm_are_the_same(model: Any, weights: CheckpointWeights) -> None:
    assert last_norm_eps_of(weights) == last_norm_eps_of(model)
    rotary = getattr(model, "rotary_emb", None)
    if rotary is not None:
        assert torch.equal(weights.rotary_emb.inv_freq, rotary.inv_freq)
        assert weights.rotary_emb.attention_scaling == rotary.attention_scaling


class _OnCuda:
    """The same model, which says that it lies on a GPU in bf16."""

    def __init__(self, model: Any) -> None:
        self.architecture = architecture_of(model)
        self.config = model.config
        self.rotary_emb = getattr(model, "rotary_emb", None)
        self.device = torch.device("cuda:0")
        self.dtype = torch.bfloat16


def test_a_checkpoint_that_names_its_tensors_otherwise_has_none(
    directory: ModelDirectory, model: Any
) -> None:
    renamed = tuple(
        msgspec.structs.replace(tensor, name=f"other.{tensor.name}") for tensor in directory.tensors
    )
    assert described(model, msgspec.structs.replace(directory, tensors=renamed)) is None
