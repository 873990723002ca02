"""LoRA adapters: the vectors of a model that was merged by the paper's formula, under a version of their own; the rest is refused."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedq_consumer.engine import Encoder, LoadOptions, ModelError, Text, Tokens, load_encoder
from embedq_consumer.engine.adapters import base_of, read_adapter
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3

TEXTS = ("a tide", "", "The harbour pilot boards the ship. " * 5, "ein Satz")
QWEN = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
BERT = ("attention.self.query", "attention.output.dense", "output.dense")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(found / "qwen", seed=1)
    make_tiny_bert(found / "bert", seed=1)
    return found


def layers_of(base: Path, kind: str) -> list[str]:
    """The linear layers that an adapter of this test changes."""
    ends = QWEN if kind == "qwen" else BERT
    names = [name.removesuffix(".weight") for name in load_file(base / "model.safetensors")]
    return [name for name in names if name.endswith(ends)]


def an_adapter(
    root: Path, name: str, base: str, *, seed: int = 0, prefix: str = "", rank: int = 4, **config: Any
) -> Path:
    """Write an adapter over `base`, as PEFT does."""
    path = root / name
    path.mkdir()
    weights = load_file(root / base / "model.safetensors")
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in layers_of(root / base, base):
        out, width = weights[f"{module}.weight"].shape
        whole = f"base_model.model.{prefix}{module}"
        tensors[f"{whole}.lora_A.weight"] = torch.randn(rank, width, generator=random) / math.sqrt(width)
        tensors[f"{whole}.lora_B.weight"] = torch.randn(out, rank, generator=random) / 4
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    known = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "bias": "none",
        "inference_mode": True,
        "target_modules": ["q_proj"],
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "modules_to_save": None,
        "peft_version": "0.18.0",
    }
    (path / "adapter_config.json").write_text(json.dumps(known | config))
    return path


def merged(root: Path, name: str, adapter: Path, base: str, scale: float, prefix: str = "") -> Path:
    """The model that the formula gives: W + scale · B · A."""
    path = root / name
    shutil.copytree(root / base, path)
    weights = load_file(path / "model.safetensors")
    halves = load_file(adapter / "adapter_model.safetensors")
    for module in layers_of(root / base, base):
        whole = f"base_model.model.{prefix}{module}"
        added = halves[f"{whole}.lora_B.weight"].double() @ halves[f"{whole}.lora_A.weight"].double()
        weight = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = (weight.double() + scale * added).to(weight.dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def loaded(path: Path, root: Path, **options: Any) -> Encoder:
    return load_encoder(path, LoadOptions(device="cpu", threads=1, root=root, **options))


def vectors(encoder: Encoder) -> np.ndarray[Any, Any]:
    tokens = encoder.tokenize([Text(text) for text in TEXTS])
    found = []
    for each in tokens:
        assert isinstance(each, Tokens)
        found.append(encoder.encode([each.ids])[0])
    encoder.close()
    return np.stack(found)


@pytest.mark.parametrize("base", ["qwen", "bert"])
@pytest.mark.parametrize(
    ("config", "scale", "prefix"),
    [
        ({}, 2.0, ""),
        ({"use_rslora": True, "lora_alpha": 16}, 8.0, "model."),
    ],
)
def test_an_adapter_gives_the_vectors_of_its_merged_model(
    root: Path, tmp_path: Path, base: str, config: dict[str, Any], scale: float, prefix: str
) -> None:
    name = f"{base}-{scale:g}"
    adapter = an_adapter(root, f"{name}-adapter", base, prefix=prefix, **config)
    whole = merged(root, f"{name}-merged", adapter, base, scale, prefix)
    plain, expected = loaded(root / base, root), loaded(whole, root)
    # The second load comes from what the first has left in the cache of known models.
    first, second = (loaded(adapter, root, known_models=tmp_path) for _ in range(2))
    versions = {plain.model_version, expected.model_version, first.model_version}
    assert len(versions) == 3
    assert first.model_version == second.model_version
    assert "weights" in second.phases
    wanted, found = vectors(expected), vectors(first)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(vectors(second), found)
    assert np.abs(vectors(plain) - wanted).max() > 1e-2  # it is not the base that answers


def test_a_version_covers_base_matrices_and_scale_wherever_they_lie(root: Path) -> None:
    def version(path: Path) -> str:
        encoder = loaded(path, root)
        encoder.close()
        return encoder.model_version

    one = an_adapter(root, "v-one", "bert")
    same = an_adapter(root, "v-same", "bert", lora_dropout=0.5, peft_version="0.1")
    others = [
        an_adapter(root, "v-scale", "bert", lora_alpha=9),
        an_adapter(root, "v-matrices", "bert", seed=1),
    ]
    make_tiny_bert(root / "another-bert", seed=2)
    shutil.copytree(one, root / "v-base")
    config = json.loads((one / "adapter_config.json").read_text())
    (root / "v-base" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "another-bert"})
    )
    found = version(one)
    assert version(same) == found
    assert len({found, *map(version, others), version(root / "v-base")}) == 4


def test_alpha_may_differ_by_layer(root: Path) -> None:
    adapter = read_adapter(
        an_adapter(root, "patterns", "bert", alpha_pattern={"encoder.layer.0.output.dense": 2})
    )
    assert {layer.module: layer.scale for layer in adapter.layers if layer.scale != 2.0} == {
        "encoder.layer.0.output.dense": 0.5
    }


def test_layers_of_heads_and_poolers_are_not_needed(root: Path) -> None:
    adapter = an_adapter(root, "with-head", "bert")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in ("pooler.dense", "cls.predictions.transform.dense"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(4, 128)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(128, 4)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert np.isfinite(vectors(loaded(adapter, root))).all()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: only plain LoRA is served"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save: only plain LoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: only plain LoRA"),
        ({"lora_bias": True}, "lora_bias: only plain LoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: only plain LoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: only plain LoRA"),
        ({"something_new": 1}, "something_new: only plain LoRA"),
        ({"bias": "all"}, "bias: expected none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base model's weights"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '\\(' is no regular expression"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a model directory's name"),
        ({"base_model_name_or_path": "../outside"}, "base_model_name_or_path: expected a directory below"),
        ({"base_model_name_or_path": "an-org/a-base"}, r"`embedq pull an-org/a-base`"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(root: Path, config: dict[str, Any], reason: str) -> None:
    adapter = an_adapter(root, f"refused-{uuid.uuid4().hex}", "bert", **config)
    with pytest.raises(ModelError, match=reason):
        loaded(adapter, root)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"x.lora_A.weight": (4, 8)}, "expected lora_A and lora_B, it has lora_A alone"),
        ({"x.lora_A.weight": (4, 8), "x.lora_B.weight": (8, 5)}, "lora_A is of rank 4, lora_B of rank 5"),
        ({"x.lora_A.weight": (4, 8), "x.lora_B.weight": (8, 4)}, "x: expected one weight of that name"),
        ({"x.lora_embedding_A": (4, 8)}, "expected lora_A and lora_B of linear layers alone"),
        ({"x.lora_magnitude_vector": (8,)}, "expected lora_A and lora_B of linear layers alone"),
        ({"x.lora_A.weight": (4, 8, 1, 1)}, "expected a matrix of floats"),
        ({}, "no tensors"),
        (
            {
                "encoder.layer.0.output.dense.lora_A.weight": (4, 8),
                "encoder.layer.0.output.dense.lora_B.weight": (8, 4),
            },
            "adds a matrix of \\(8, 8\\), the base model's weight is",
        ),
    ],
)
def test_matrices_that_do_not_fit_are_refused_by_name(
    root: Path, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    adapter = an_adapter(root, f"torn-{uuid.uuid4().hex}", "bert")
    save_file(
        {f"base_model.model.{name}": torch.zeros(shape) for name, shape in tensors.items()},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match=reason):
        loaded(adapter, root)


def test_what_lies_around_an_adapter_is_refused_by_name(root: Path) -> None:
    laid_out = an_adapter(root, "laid-out", "bert")
    (laid_out / "modules.json").write_text("[]")
    pickled = an_adapter(root, "pickled", "bert")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    over_another = an_adapter(root, "over-another", "bert")
    config = json.loads((over_another / "adapter_config.json").read_text())
    (over_another / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "pickled"})
    )
    whole = root / "whole-too"
    shutil.copytree(root / "bert", whole)
    shutil.copy(over_another / "adapter_config.json", whole)
    for path, reason in (
        (laid_out, "modules.json: pooling and prompts are the base model's"),
        (pickled, "pickled weights \\(adapter_model.bin\\) are never loaded"),
        (over_another, "'pickled' is an adapter itself"),
        (whole, "an adapter and a whole model in one directory"),
    ):
        with pytest.raises(ModelError, match=reason):
            loaded(path, root)


def test_without_a_model_root_there_is_no_base(root: Path) -> None:
    adapter = an_adapter(root, "no-root", "bert")
    with pytest.raises(ModelError, match="there is none"):
        base_of(adapter, None)
