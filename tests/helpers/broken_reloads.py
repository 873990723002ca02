"""Ways to break a reload: what is done to a model directory or asked of it, the step that finds it, and what an operator is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from embedq_shared.messages import GOLDEN_FILE
from tests.helpers.bad_models import config, copied, panicking_tokenizer, pipe
from tests.helpers.tiny_models import make_tiny_bert, nan_weights


class Way(NamedTuple):
    """`make` fills the directory at the path that it gets, whose model root is `model`'s; `asked` are fields of the command."""

    make: Callable[[Path, Path], object]
    step: str
    told: str
    asked: dict[str, Any] = {}  # noqa: RUF012  # nobody changes it
    path: str | None = None
    """Of the command, where it is not the directory's name."""


def of(harm: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Done to a copy of a good model."""
    return lambda model, to: harm(copied(model, to))


def nothing(model: Path, to: Path) -> None:
    """No directory is made."""


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], object]:
    def apply(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return of(apply)


def renamed(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.0.output.dense.offset"] = tensors.pop("encoder.layer.0.output.dense.bias")


def cut(name: str, share: float) -> Callable[[Path, Path], object]:
    def apply(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: int(len(content) * share)])

    return of(apply)


def without(name: str) -> Callable[[Path, Path], object]:
    return of(lambda model: (model / name).unlink())


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def larger_than_the_machine(model: Path) -> None:
    """A tensor of a terabyte that takes no room on the disk."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["more.weight"] = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [end, end + (1 << 40)]}
    packed = json.dumps(header).encode()
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + content[8 + length :])
    os.truncate(file, 8 + len(packed) + end + (1 << 40))


def golden(content: Any) -> Callable[[Path, Path], object]:
    return of(lambda model: (model / GOLDEN_FILE).write_text(json.dumps(content)))


ANOTHER: Final = {"texts": [{"text": "one", "embedding": [1.0, *[0.0] * 63]}]}

WAYS: Final = {
    "gone": Way(nothing, "validate", "is not one"),
    "a-file": Way(lambda _, to: to.write_text("no directory"), "validate", "is not one"),
    "outside": Way(nothing, "validate", "expected a directory below", path="../outside"),
    "absolute": Way(nothing, "validate", "expected a directory below", path="/etc"),
    "no-config": Way(without("config.json"), "validate", "config.json: missing"),
    "no-tokenizer": Way(without("tokenizer.json"), "validate", "tokenizer.json: missing"),
    "no-weights": Way(without("model.safetensors"), "validate", "model.safetensors: missing"),
    "pickled": Way(of(pickled), "validate", "pickled weights (pytorch_model.bin) are never loaded"),
    "cut-weights": Way(cut("model.safetensors", 0.5), "validate", "cut short"),
    "cut-header": Way(cut("model.safetensors", 0.0001), "validate", "cut short"),
    "cut-tokenizer": Way(cut("tokenizer.json", 0.5), "validate", "tokenizer.json: not valid JSON"),
    "a-pipe": Way(of(pipe("model.safetensors")), "validate", "it is a named pipe"),
    "other-shapes": Way(of(config(hidden_size=192)), "validate", "expected the shape"),
    "other-names": Way(weights(renamed), "validate", "1 tensors are missing"),
    "a-tensor-less": Way(
        weights(lambda tensors: tensors.pop("embeddings.LayerNorm.bias")), "validate", "1 tensors are missing"
    ),
    "other-tokenizer": Way(of(config(vocab_size=100)), "validate", "the embedding table has 100 rows"),
    "a-panic": Way(of(panicking_tokenizer), "validate", "tokenizer.json: "),
    "own-code": Way(
        of(config(auto_map={"AutoConfig": "nobody/repo--code.Config"})), "validate", "code from a hub"
    ),
    "too-large": Way(of(larger_than_the_machine), "validate", "memory: needs 1099.5 GB at least"),
    "too-short": Way(
        lambda _, to: make_tiny_bert(to, hidden=32),
        "validate",
        "dimensions: jobs of the last hour asked for 64",
    ),
    "shorter-than-asked": Way(of(lambda _: None), "validate", "min_dimensions", {"min_dimensions": 512}),
    "fp8-on-a-cpu": Way(of(lambda _: None), "validate", "needs CUDA", {"quantization": "fp8"}),
    "no-golden": Way(of(lambda _: None), "validate", "nowhere.json: missing", {"golden": "nowhere.json"}),
    "bad-golden": Way(golden({"texts": []}), "validate", "embedq_golden.json: Expected `array`"),
    "another-vector": Way(golden(ANOTHER), "check", "golden: texts[0]"),
    "nan": Way(lambda _, to: nan_weights(to), "check", "expected finite vectors", {"min_dimensions": 1}),
    "another-digest": Way(of(lambda _: None), "check", "digest", {"digest": "sha256:" + "0" * 64}),
    "another-space": Way(
        lambda _, to: make_tiny_bert(to, seed=9, hidden=256, layers=6),
        "check",
        "min_cosine",
        {"min_cosine": 0.995},
    ),
}
"""By the name of the directory that a test gives it."""
