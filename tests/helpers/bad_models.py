"""Model directories that harm whoever opens them, made out of a good one: pipes, devices, sparse files, a tokenizer that panics."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from embedq_consumer.engine.safety.bounds import NUMBERS

GB: Final = 1_000_000_000


class Harm(NamedTuple):
    """What is done to a directory, and what an operator is told."""

    do: Callable[[Path], object]
    told: str


def copied(model: Path, to: Path) -> Path:
    """A directory of its own, without links."""
    shutil.copytree(model, to)
    return to


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | fields))


def panicking_tokenizer(model: Path) -> None:
    """A `Precompiled` normalizer whose table is cut short: the tokenizers library panics when it reads the file."""
    edit(
        model / "tokenizer.json",
        normalizer={
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(b"\1\0\0").decode(),
        },
    )


def without_unknown_token(model: Path) -> None:
    """Its vocabulary lacks the token for what it does not know: each text with such a character fails."""
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text())
    unknown = settings["model"]["unk_token"]
    vocabulary = settings["model"]["vocab"]
    # Its id stays taken, so that the other tokens keep theirs.
    settings["model"]["vocab"] = {
        (f"{token}-gone" if token == unknown else token): n for token, n in vocabulary.items()
    }
    settings["added_tokens"] = [each for each in settings["added_tokens"] if each["content"] != unknown]
    file.write_text(json.dumps(settings))
    config = json.loads((model / "tokenizer_config.json").read_text())
    kept = {
        name: value for name, value in config.items() if value != unknown and name != "added_tokens_decoder"
    }
    (model / "tokenizer_config.json").write_text(json.dumps(kept))


def sparse(name: str, size: int) -> Callable[[Path], object]:
    """A file of this size that takes no room on the disk."""

    def make(model: Path) -> None:
        with (model / name).open("ab") as file:
            file.truncate(size)

    return make


def linked(name: str, target: str) -> Callable[[Path], object]:
    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return make


def pipe(name: str) -> Callable[[Path], object]:
    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return make


def config(**fields: Any) -> Callable[[Path], object]:
    return lambda model: edit(model / "config.json", **fields)


HARMS: Final = {
    "pipe-as-config": Harm(pipe("config.json"), "config.json: expected a regular file, it is a named pipe"),
    "pipe-as-weights": Harm(pipe("model.safetensors"), "expected a regular file, it is a named pipe"),
    "pipe-beside": Harm(pipe("chat_template.jinja"), "chat_template.jinja: expected a regular file"),
    "endless-link": Harm(
        linked("special_tokens_map.json", "/dev/zero"),
        "special_tokens_map.json: a link to /dev/zero, outside of the model root",
    ),
    "secret-link": Harm(linked("vocab.txt", "/etc/passwd"), "a link to /etc/passwd, outside"),
    "sparse-map": Harm(
        sparse("special_tokens_map.json", 3 * GB), "expected at most 4,194,304 bytes, it has 3,000,000,000"
    ),
    "sparse-tokenizer": Harm(sparse("tokenizer.json", 6 * GB), "expected at most 67,108,864 bytes"),
    "sparse-config": Harm(sparse("config.json", 4 * GB), "config.json: expected at most"),
    "panic": Harm(panicking_tokenizer, "tokenizer.json: "),
    "no-unknown-token": Harm(without_unknown_token, "the tokenizer does not take every text"),
    "hub-kernel": Harm(config(attn_implementation="nobody/kernel"), "'nobody/kernel' is a kernel from a hub"),
    "own-code": Harm(
        config(auto_map={"AutoConfig": "nobody/repo--code.Config"}),
        "auto_map: the model needs code from a hub",
    ),
    "a-million-layers": Harm(
        config(num_hidden_layers=1_000_000),
        f"num_hidden_layers: expected a number from 0 to {NUMBERS['num_hidden_layers']}",
    ),
}
"""By the name of the directory that a test gives it."""
