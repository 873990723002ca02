"""The model version is equal exactly when vectors are comparable."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from embedq_consumer.engine import load_encoder
from tests.helpers.tiny_models import make_tiny_qwen3
from tests.model.test_model_directory import Change, edit, shard, write


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return make_tiny_qwen3(tmp_path / "qwen3")


def version_of(path: Path) -> str:
    encoder = load_encoder(path, device="cpu")
    encoder.close()
    return encoder.model_version


def nudge_one_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def replace_in_tokenizer(path: Path) -> None:
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "NFKC"}
    (path / "tokenizer.json").write_text(json.dumps(settings))


def rewrite_weights_in_another_order(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(
        dict(reversed(load_file(path / "model.safetensors").items())), path / "model.safetensors", {"a": "b"}
    )


def split_weights(path: Path) -> None:
    shard(path)


def test_a_version_is_sha256_and_64_digits(qwen3: Path) -> None:
    assert re.fullmatch("sha256:[0-9a-f]{64}", version_of(qwen3))


def test_a_copy_has_the_same_version(qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").rglob("*"):
        os.utime(file, (0, 0))
    assert version_of(tmp_path / "copy") == version_of(qwen3)


@pytest.mark.parametrize(
    "change",
    [
        write("README.md", "hello"),
        write("onnx_notes.txt", "hello"),
        edit("config.json", _name_or_path="elsewhere", transformers_version="0.0.1"),
        edit(
            "tokenizer_config.json", chat_template="{{ messages }}", padding_side="left", backend="tokenizers"
        ),
        edit("tokenizer_config.json", add_prefix_space=True),
        edit("config_sentence_transformers.json", similarity_fn_name="dot", __version__={"pytorch": "2"}),
        rewrite_weights_in_another_order,
        split_weights,
    ],
    ids=[
        "readme",
        "other file",
        "config",
        "tokenizer",
        "a flag that its class ignores",
        "sentence-transformers",
        "order",
        "shards",
    ],
)
def test_what_no_vector_depends_on_keeps_the_version(qwen3: Path, change: Change) -> None:
    before = version_of(qwen3)
    change(qwen3)
    assert version_of(qwen3) == before


@pytest.mark.parametrize(
    "change",
    [
        nudge_one_weight,
        replace_in_tokenizer,
        edit("tokenizer_config.json", split_special_tokens=True),
        edit("1_Pooling/config.json", pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
        edit("config_sentence_transformers.json", prompts={"query": "Instruct: other\nQuery:"}),
        edit("config_sentence_transformers.json", default_prompt_name="query"),
        edit("sentence_bert_config.json", max_seq_length=100),
        edit("sentence_bert_config.json", do_lower_case=True),
        edit("config.json", rms_norm_eps=1e-3),
    ],
    ids=[
        "weight",
        "tokenizer",
        "tokenizer config",
        "pooling",
        "prompt",
        "default prompt",
        "length",
        "case",
        "config",
    ],
)
def test_what_a_vector_depends_on_changes_the_version(qwen3: Path, change: Change) -> None:
    before = version_of(qwen3)
    change(qwen3)
    assert version_of(qwen3) != before


def test_two_seeds_are_two_versions(qwen3: Path, tmp_path: Path) -> None:
    assert version_of(make_tiny_qwen3(tmp_path / "again")) == version_of(qwen3)
    assert version_of(make_tiny_qwen3(tmp_path / "other", seed=1)) != version_of(qwen3)
