"""Directories that cannot be served are refused by name, before their weights are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedq_consumer.engine import ModelError, load_encoder
from embedq_consumer.engine.model_directory import read_directory
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3

Change = Callable[[Path], None]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return make_tiny_bert(tmp_path / "bert")


def edit(file: str, **fields: Any) -> Change:
    """Set fields of one JSON file; None removes one."""

    def change(path: Path) -> None:
        target = path / file
        settings = json.loads(target.read_text()) if target.exists() else {}
        settings |= fields
        removed = {name for name, value in fields.items() if value is None}
        target.write_text(json.dumps({name: settings[name] for name in settings if name not in removed}))

    return change


def write(file: str, content: str | bytes) -> Change:
    return lambda path: void(
        (path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    )


def remove(file: str) -> Change:
    return lambda path: (path / file).unlink()


def void(_: object) -> None:
    pass


def rename_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def modules(*kinds: str, folder: str = "1_Pooling") -> Change:
    entries = [
        {
            "idx": n,
            "name": str(n),
            "path": "" if n == 0 else folder,
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]
    return write("modules.json", json.dumps(entries))


REFUSED: list[tuple[str, Change, str]] = [
    ("no config", remove("config.json"), r"/config\.json: missing"),
    ("config is not JSON", write("config.json", "{"), r"/config\.json: not valid JSON"),
    ("config is not text", write("config.json", b"\xff\xfe\xfa"), r"/config\.json: not valid JSON"),
    ("config is a list", write("config.json", "[]"), r"/config\.json: expected an object"),
    ("no model type", edit("config.json", model_type=None), "model_type"),
    ("unknown model type", edit("config.json", model_type="nonesuch"), "config.json.*nonesuch"),
    ("own code", edit("config.json", auto_map={"AutoModel": "modeling.X"}), "auto_map"),
    (
        "quantized oddly",
        edit("config.json", quantization_config=["gptq"]),
        "quantization_config: expected an",
    ),
    (
        "encoder-decoder",
        edit("config.json", is_encoder_decoder=True),
        "is_encoder_decoder: .*t5.*, got model_type 'bert'",
    ),
    ("an adapter", write("adapter_config.json", "{}"), "adapter_config.json"),
    ("no tokenizer", remove("tokenizer.json"), r"/tokenizer\.json: missing"),
    ("tokenizer is not JSON", write("tokenizer.json", "nope"), r"/tokenizer\.json: not valid JSON"),
    ("tokenizer is something else", write("tokenizer.json", "{}"), r"tokenizer\.json: "),
    ("no weights", remove("model.safetensors"), r"/model\.safetensors: missing"),
    ("pickled weights", rename_weights, r"pickled weights \(pytorch_model\.bin\) are never loaded"),
    ("weights cut short", cut_weights, r"/model\.safetensors: cut short"),
    ("weights of another kind", write("model.safetensors", b"PK\x03\x04" * 9), "not a safetensors file"),
    ("weights empty", write("model.safetensors", b""), "not a safetensors file"),
    ("modules is an object", write("modules.json", "{}"), r"/modules\.json: expected a list"),
    ("an LSTM module", modules("Transformer", "Pooling", "LSTM"), r"modules\.json: type: .*LSTM"),
    (
        "a Dense module first",
        modules("Transformer", "Dense", "Pooling"),
        r"modules\.json: expected a Transformer, then a Pooling",
    ),
    ("no Pooling", modules("Transformer"), r"modules\.json: expected"),
    ("a folder outside", modules("Transformer", "Pooling", folder="../elsewhere"), r"modules\.json: path"),
    ("no pooling config", remove("1_Pooling/config.json"), r"1_Pooling/config\.json: missing"),
    ("another pooling", edit("1_Pooling/config.json", pooling_mode="attention"), "pooling_mode: .*attention"),
    ("a pooling that is a number", edit("1_Pooling/config.json", pooling_mode=["mean", 3]), "pooling_mode"),
    ("no poolings", edit("1_Pooling/config.json", pooling_mode=[]), "pooling_mode"),
    ("a pooling twice", edit("1_Pooling/config.json", pooling_mode=["mean", "mean"]), "each pooling once"),
    ("prompt left out", edit("1_Pooling/config.json", include_prompt=False), "include_prompt"),
    ("another dimension", edit("1_Pooling/config.json", word_embedding_dimension=64), "hidden_size is 128"),
    (
        "a flag that is not one",
        edit("1_Pooling/config.json", pooling_mode_mean_tokens="yes"),
        "expected true or false",
    ),
    (
        "unknown default prompt",
        edit("config_sentence_transformers.json", default_prompt_name="x"),
        "default_prompt_name",
    ),
    ("prompts of numbers", edit("config_sentence_transformers.json", prompts={"query": 1}), "prompts"),
    ("a sparse encoder", edit("config_sentence_transformers.json", model_type="SparseEncoder"), "model_type"),
    ("no length", edit("sentence_bert_config.json", max_seq_length=0), "max_seq_length"),
    ("another task", edit("sentence_bert_config.json", transformer_task="fill-mask"), "transformer_task"),
    (
        "changed config",
        edit("sentence_bert_config.json", config_args={"num_labels": 3}),
        "config_args.*num_labels",
    ),
    ("no room", edit("sentence_bert_config.json", max_seq_length=2), "no room"),
]


@pytest.mark.parametrize(
    ("change", "message"), [(c, m) for _, c, m in REFUSED], ids=[name for name, _, _ in REFUSED]
)
def test_a_broken_directory_is_refused_by_name(bert: Path, change: Change, message: str) -> None:
    change(bert)
    with pytest.raises(ModelError, match=message):
        load_encoder(bert, device="cpu")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_encoder(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(bert: Path, device: str) -> None:
    with pytest.raises(ModelError, match=device):
        load_encoder(bert, device=device)


def test_weights_that_do_not_fill_the_model_are_refused(bert: Path) -> None:
    edit("config.json", num_hidden_layers=3)(bert)
    with pytest.raises(
        ModelError, match=r"model\.safetensors: 16 tensors are missing, among them encoder\.layer\.2"
    ):
        load_encoder(bert, device="cpu")


def test_weights_of_other_shapes_are_refused(bert: Path) -> None:
    edit("config.json", intermediate_size=64)(bert)
    with pytest.raises(ModelError, match=r"config\.json|model\.safetensors"):
        load_encoder(bert, device="cpu")


def test_every_shard_must_be_there(tmp_path: Path) -> None:
    path = make_tiny_qwen3(tmp_path)
    shards = shard(path)
    load_encoder(path, device="cpu").close()
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name}: missing"):
        load_encoder(path, device="cpu")


def test_the_transformer_may_lie_in_its_own_folder(bert: Path) -> None:
    folder = bert / "0_Transformer"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.move(bert / name, folder / name)
    entries = json.loads((bert / "modules.json").read_text())
    entries[0]["path"] = folder.name
    write("modules.json", json.dumps(entries))(bert)
    load_encoder(bert, device="cpu").close()


def test_module_names_of_newer_releases_are_known(bert: Path) -> None:
    entries = json.loads((bert / "modules.json").read_text())
    for entry, kind in zip(entries, ("Transformer", "Pooling", "Normalize"), strict=True):
        entry["type"] = f"sentence_transformers.base.modules.{kind.lower()}.{kind}"
    write("modules.json", json.dumps(entries))(bert)
    write("1_Pooling/config.json", '{"embedding_dimension": 128, "pooling_mode": "cls"}')(bert)
    assert read_directory(bert).pooling == ("cls",)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [("BertModel", "mean"), ("Qwen3ForCausalLM", "lasttoken"), ("Qwen3Model", "mean")],
)
def test_a_bare_directory_pools_as_sentence_transformers_would(
    bert: Path, architecture: str, pooling: str
) -> None:
    (bert / "modules.json").unlink()
    edit("config.json", architectures=[architecture])(bert)
    assert read_directory(bert).pooling == (pooling,)


def test_the_limit_is_max_seq_length_where_it_is_set(bert: Path) -> None:
    edit("sentence_bert_config.json", max_seq_length=50)(bert)
    assert load_encoder(bert, device="cpu").max_tokens == 50
    edit("sentence_bert_config.json", max_seq_length=None)(bert)
    edit("tokenizer_config.json", model_max_length=10**30)(bert)
    assert load_encoder(bert, device="cpu").max_tokens == 128


def shard(path: Path) -> list[Path]:
    """Split `model.safetensors` in two, with an index, as transformers does for large models."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    halves = [names[::2], names[1::2]]
    files = [path / f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in half}, file, metadata={"format": "pt"})
    weight_map = {name: file.name for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return files
