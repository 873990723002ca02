"""`embedq pull` against a hub on this machine: what comes, what stays away, and every way in which it fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from embedq_sdk.cli.commands import cli
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.hub import MANIFEST, Manifest, Pulled, PullFailed, pull
from tests.helpers.model_hub import Hub, Repository, a_hub

WEIGHTS = bytes(range(256)) * 400
FILES = {
    "README.md": b"# a model",
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickled",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    ".gitattributes": b"* lfs",
    "../escape.json": b"{}",
    "training.py": b"print()",
}
KEPT = ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with a_hub() as found:
        found.models["an-org/a-model"] = Repository(files=FILES)
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def fetch(hub: Hub, root: Path, repository: str = "an-org/a-model", **more: Any) -> Pulled:
    return pull(repository, root, endpoint=hub.address, **more)


def failure(hub: Hub, root: Path, repository: str = "an-org/a-model", **more: Any) -> str:
    with pytest.raises(PullFailed) as raised:
        fetch(hub, root, repository, **more)
    assert not (root / "an-org" / "a-model").exists() or more.pop("name", None) is None
    return raised.value.reason


def test_a_model_comes_whole_with_a_manifest_and_nothing_else_comes(hub: Hub, root: Path) -> None:
    pulled = fetch(hub, root)
    assert pulled.directory == root / "an-org" / "a-model"
    there = sorted(
        path.relative_to(pulled.directory).as_posix()
        for path in pulled.directory.rglob("*")
        if path.is_file()
    )
    assert there == sorted([*KEPT, MANIFEST])
    manifest = msgspec.json.decode((pulled.directory / MANIFEST).read_bytes(), type=Manifest)
    assert manifest == pulled.manifest
    assert (manifest.repository, manifest.revision) == ("an-org/a-model", hub.models["an-org/a-model"].commit)
    assert {file.path: (file.size, file.sha256) for file in manifest.files} == {
        name: (len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest()) for name in KEPT
    }
    assert sorted(path.name for path in root.iterdir()) == ["an-org"]
    assert hub.downloads()[-1] == "model.safetensors"  # the largest at last


def test_a_model_that_is_there_is_compared_without_asking_the_hub(hub: Hub, root: Path) -> None:
    fetch(hub, root)
    hub.asked.clear()
    again = fetch(hub, root)
    assert (again.fetched, hub.asked) == (False, [])
    assert fetch(hub, root, revision=again.manifest.revision).manifest == again.manifest


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda at: (at / "config.json").unlink(), "config.json: missing"),
        (lambda at: (at / "config.json").write_bytes(b"{}"), "config.json: expected 22 bytes, got 2"),
        (
            lambda at: (at / "model.safetensors").write_bytes(bytes(len(WEIGHTS))),
            "model.safetensors: its content has changed",
        ),
    ],
)
def test_a_directory_that_was_changed_is_told_and_left_alone(
    hub: Hub, root: Path, harm: Any, told: str
) -> None:
    pulled = fetch(hub, root)
    harm(pulled.directory)
    with pytest.raises(PullFailed, match=told):
        fetch(hub, root)


def test_another_revision_never_replaces_what_may_be_served(hub: Hub, root: Path) -> None:
    first = fetch(hub, root)
    newer = "f" * 40
    hub.models["an-org/a-model"].commit = newer
    assert "choose another --name" in failure(hub, root, revision=newer)
    second = fetch(hub, root, revision="main", name="an-org/a-model@new")
    assert second.manifest.revision == newer
    assert first.directory.is_dir()


def test_a_directory_that_was_not_pulled_is_left_alone(hub: Hub, root: Path) -> None:
    (root / "mine").mkdir()
    assert "was not pulled" in failure(hub, root, name="mine")


def test_a_pull_that_broke_off_goes_on(hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models["an-org/a-model"] = Repository(files=FILES, lies=frozenset({"model.safetensors"}))
    assert "is not what the hub says" in failure(hub, root)
    [partial] = root.iterdir()
    assert partial.name.startswith(".pull-")
    hub.models["an-org/a-model"] = Repository(files=FILES)
    hub.asked.clear()
    assert fetch(hub, root).fetched
    assert hub.downloads() == ["model.safetensors"]


@pytest.mark.parametrize(
    ("repository", "model", "more", "told"),
    [
        ("an-org/nothing", None, {}, "has no such model, or it is private: then set HF_TOKEN"),
        ("an-org/a-model", Repository(files=FILES, gated=True), {}, "lets nobody in without being asked"),
        ("an-org/a-model", Repository(files=FILES), {"revision": "v9"}, "has no revision v9"),
        (
            "an-org/a-model",
            Repository(files={"config.json": b"{}", "pytorch_model.bin": b"x"}),
            {},
            "no safetensors weights; pickled ones are never loaded",
        ),
        ("an-org/a-model", Repository(files={"model.safetensors": b"x"}), {}, "it has no config.json"),
        (
            "an-org/a-model",
            Repository(files=FILES, lies=frozenset({"config.json"})),
            {},
            "config.json is not what the hub says it is",
        ),
    ],
)
def test_each_failure_has_its_reason_and_leaves_no_model(
    hub: Hub, root: Path, repository: str, model: Repository | None, more: dict[str, Any], told: str
) -> None:
    if model is not None:
        hub.models[repository] = model
    assert told in failure(hub, root, repository, **more)
    assert not (root / "an-org").exists()


def test_a_hub_that_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(PullFailed, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        pull("an-org/a-model", root, endpoint="http://127.0.0.1:9")


def test_a_disk_without_room_is_told_before_anything_comes(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "bytes more, and" in failure(hub, root)
    assert hub.downloads() == []


@pytest.mark.parametrize("repository", ["", "a/b/c", "../x", "a b", "https://huggingface.co/a/b", "a/.."])
def test_what_is_no_id_is_refused(hub: Hub, root: Path, repository: str) -> None:
    with pytest.raises(InvalidArgument, match="ID"):
        fetch(hub, root, repository)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", ".x", "a/.x", "a\0"])
def test_a_name_that_leads_elsewhere_is_refused(hub: Hub, root: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        fetch(hub, root, name=name)


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command_says_what_came_and_what_to_do_with_it(hub: Hub, root: Path) -> None:
    environ = {"HF_ENDPOINT": hub.address, "EMBEDQ_MODEL": str(root / "another"), "EMBEDQ_MODEL_ROOT": None}
    done = CliRunner().invoke(cli, ["pull", "an-org/a-model"], env=environ)
    assert done.exit_code == 0, done.output
    assert "model.safetensors: 102,400 bytes" in done.output
    assert "5 files" in done.output
    assert "next: embedq reload an-org/a-model" in done.output
    again = CliRunner().invoke(cli, ["pull", "an-org/a-model"], env=environ)
    assert "is there already, unchanged" in again.output
    failed = CliRunner().invoke(cli, ["pull", "an-org/other"], env=environ)
    assert (failed.exit_code, "has no such model" in failed.output) == (1, True)
    wrong = CliRunner().invoke(cli, ["pull", "no id"], env=environ)
    assert (wrong.exit_code, "`ID`: expected" in wrong.output) == (2, True)
    nowhere = CliRunner().invoke(cli, ["pull", "a/b"], env=environ | {"EMBEDQ_MODEL": None})
    assert (nowhere.exit_code, "expected --root" in nowhere.output) == (2, True)


def test_without_the_extra_it_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PullFailed, match=r"pip install 'embedq\[hub\]'"):
        pull("an-org/a-model", root)


def test_a_manifest_is_for_people_too(hub: Hub, root: Path) -> None:
    text = (fetch(hub, root).directory / MANIFEST).read_text()
    assert json.loads(text)["repository"] == "an-org/a-model"
    assert text.count("\n") > 5
