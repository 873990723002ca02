"""What is known of a directory before a weight is read: that it will not do, and what it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from embedq_consumer.engine import (
    Abandoned,
    Cancellation,
    Footprint,
    ModelError,
    inspect_model,
    load_encoder,
    read_ahead,
)
from embedq_consumer.engine.api import LoadOptions
from embedq_consumer.engine.loading import inspection
from embedq_consumer.engine.loading.dry_run_process import try_directory
from embedq_consumer.engine.loading.inspection import footprint_of
from embedq_consumer.engine.loading.memory_check import DeviceMemory
from embedq_consumer.engine.model_directory import read_directory
from tests.helpers.bad_models import edit
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3

CPU = LoadOptions(device="cpu")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("good") / "model")


def test_what_it_takes_is_computed_from_the_headers(good: Path) -> None:
    found = inspect_model(good, CPU)
    weights = sum(tensor.nbytes for tensor in load_file(good / "model.safetensors").values())
    assert found.needed == weights
    assert 0 < found.free <= found.total
    assert found.device == "the machine"


@pytest.mark.parametrize(
    ("change", "hidden_size"),
    [
        ({}, 128),
        ({"hidden_size": None, "d_model": 96}, 96),
        ({"hidden_size": None, "text_config": {"hidden_size": 48}}, 48),
        ({"hidden_size": None}, None),
    ],
)
def test_the_hidden_size_is_what_the_configuration_names(
    tmp_path: Path, change: dict[str, Any], hidden_size: int | None
) -> None:
    model = make_tiny_bert(tmp_path / "model")
    edit(model / "config.json", **change)
    assert inspect_model(model, CPU).hidden_size == hidden_size


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def renamed(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.offset"] = tensors.pop("encoder.layer.0.output.dense.bias")


def with_a_head(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[f"bert.{name}"] = tensors.pop(name)
    tensors["cls.predictions.bias"] = tensors["bert.embeddings.word_embeddings.weight"][:, 0].clone()


def as_tensorflow_named_them(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[new] = tensors.pop(name)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            lambda model: edit(model / "config.json", vocab_size=501),
            "embeddings.word_embeddings.weight: expected the shape (501, 128), as config.json describes it",
        ),
        (lambda model: edit(model / "config.json", hidden_size=64), "expected the shape"),
        (weights(renamed), "1 tensors are missing, among them encoder.layer.0.output.dense.bias"),
        (
            weights(lambda tensors: tensors.pop("embeddings.LayerNorm.weight")),
            "1 tensors are missing, among them embeddings.LayerNorm.weight",
        ),
        (
            lambda model: edit(model / "config.json", vocab_size=100),
            "but the embedding table has 100 rows",
        ),
    ],
    ids=["too few rows", "another width", "another name", "one is missing", "another tokenizer"],
)
def test_weights_that_are_not_the_models_are_found_without_reading_them(
    tmp_path: Path, harm: Callable[[Path], object], told: str
) -> None:
    model = make_tiny_bert(tmp_path / "model")
    harm(model)
    with pytest.raises(ModelError) as refused:
        try_directory(read_directory(model))
    assert told in str(refused.value)


@pytest.mark.parametrize("harmless", [with_a_head, as_tensorflow_named_them])
def test_weights_under_the_other_names_that_transformers_knows_pass(
    tmp_path: Path, harmless: Callable[[dict[str, Any]], object]
) -> None:
    model = make_tiny_bert(tmp_path / "model")
    weights(harmless)(model)
    try_directory(read_directory(model))


def test_a_directory_is_tried_once_and_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def counted(path: Path, *_: Any, **__: Any) -> None:
        tries.append(path)

    monkeypatch.setattr(inspection, "dry_run", counted)
    options = LoadOptions(device="cpu", dry_run_s=1, known_models=tmp_path / "known")
    model = make_tiny_qwen3(tmp_path / "model")
    for _ in range(2):
        inspect_model(model, options)
    assert len(tries) == 1
    file = model / "tokenizer_config.json"
    file.write_bytes(file.read_bytes())
    inspect_model(model, options)
    assert len(tries) == 2
    inspect_model(model, LoadOptions(device="cpu", dry_run_s=1))
    assert len(tries) == 3, "without a folder to note it in"


def footprint(model: Path, **changes: Any) -> Footprint:
    """Of a directory, as if it ran on a GPU."""
    options = LoadOptions(
        **{name: changes.pop(name) for name in list(changes) if name in ("quantization", "keep_bf16")}
    )
    given: dict[str, Any] = {
        "device": "a GPU",
        "dtype": "bf16",
        "max_tokens": 128,
        "kernels": {"gate": "a", "attention": "b"},
    }
    given |= changes
    return footprint_of(read_directory(model), given.pop("device"), options, **given)


def test_models_that_differ_by_weights_and_names_alone_take_the_same_memory(tmp_path: Path) -> None:
    one, two = (make_tiny_bert(tmp_path / str(seed), seed=seed) for seed in range(2))
    edit(two / "config.json", _name_or_path="two", transformers_version="4.0", torch_dtype="float16")
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert footprint(one) == footprint(two)
    assert footprint(one) == footprint(one, kernels={"attention": "b", "gate": "a"})


@pytest.mark.parametrize(
    "change",
    [
        {"device": "another GPU"},
        {"dtype": "float32"},
        {"max_tokens": 64},
        {"kernels": {"attention": "b"}},
        {"quantization": "fp8"},
        {"keep_bf16": (1,)},
    ],
)
def test_another_device_kernel_or_quantization_may_take_other_memory(
    good: Path, change: dict[str, Any]
) -> None:
    assert footprint(good) != footprint(good, **change)


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 256},
        {"layers": 3},
        {"pooling": "cls"},
        {"max_tokens": 64},
        {"dense": [(64, "Tanh", True)]},
    ],
)
def test_so_may_another_shape(tmp_path: Path, good: Path, other: dict[str, Any]) -> None:
    assert footprint(make_tiny_bert(tmp_path / "other", **other)) != footprint(good)


def test_a_loaded_model_says_what_the_memory_of_its_micro_batches_depends_on(
    tmp_path: Path, good: Path
) -> None:
    one, alike, other = (
        load_encoder(model, CPU)
        for model in (good, make_tiny_bert(tmp_path / "1", seed=1), make_tiny_bert(tmp_path / "2", layers=3))
    )
    assert one.footprint is not None
    assert one.footprint == alike.footprint != other.footprint
    assert (one.footprint.device, one.footprint.dtype, one.footprint.max_tokens) == (
        "cpu",
        "float32",
        one.max_tokens,
    )
    assert dict(one.footprint.kernels) == one.kernels
    assert one.model_version != alike.model_version
    for encoder in (one, alike, other):
        assert not encoder.close_some(), "a CPU has no graphs"


def test_what_the_device_cannot_do_is_known_before(good: Path) -> None:
    with pytest.raises(ModelError, match="quantization fp8: needs CUDA"):
        inspect_model(good, LoadOptions(device="cpu", quantization="fp8"))
    (good / "model.safetensors").rename(good / "weights.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        inspect_model(good, CPU)


def test_an_inspection_that_nobody_wants_tries_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "dry_run", lambda *_, **__: pytest.fail("it was tried"))
    cancel = Cancellation()
    cancel.set()
    with pytest.raises(Abandoned):
        inspect_model(make_tiny_bert(tmp_path / "model"), LoadOptions(device="cpu", dry_run_s=1), cancel)


# -- before a load that jobs wait for -----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_bert(tmp_path / "model")


def bytes_read() -> int:
    """By this process so far, from whatever; see proc(5)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


def test_all_weights_are_read_ahead(model: Path) -> None:
    weights = sum(each.end - each.begin for each in read_directory(model).all_tensors)
    before = bytes_read()
    assert read_ahead(model, CPU)
    assert bytes_read() - before >= weights


def test_files_that_find_no_room_in_memory_are_not_read_ahead(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(each.end - each.begin for each in read_directory(model).all_tensors)
    memory = DeviceMemory(device="the machine", free=weights - 1, total=1 << 40)
    monkeypatch.setattr(inspection, "host_memory", lambda: memory)
    monkeypatch.setattr(inspection, "read_tensors", lambda *_: pytest.fail("they were read"))
    assert not read_ahead(model, CPU)


def test_files_that_are_cut_short_since_they_were_inspected_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = read_directory(model)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    monkeypatch.setattr(inspection, "read_directory", lambda *_: directory)
    with pytest.raises(ModelError, match=r"model\.safetensors: cut short while it was read"):
        read_ahead(model, CPU)


def test_reading_ahead_ends_once_nobody_wants_the_model(model: Path) -> None:
    cancel = Cancellation()
    cancel.set()
    with pytest.raises(Abandoned):
        read_ahead(model, CPU, cancel)
