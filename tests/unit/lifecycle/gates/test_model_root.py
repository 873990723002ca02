"""A command's path names a directory below the model root, or is rejected with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.gates.model_root import ModelRoot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path.resolve() / "models"
    (root / "one" / "deeper").mkdir(parents=True)
    (root / "file").write_text("no directory")
    (tmp_path / "outside").mkdir()
    (root / "alias").symlink_to(root / "one")
    (root / "escape").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    return root


@pytest.mark.parametrize("path", ["one", "./one", "one/deeper/..", "alias", "one/../alias"])
def test_links_and_dots_below_the_root_lead_to_the_directory(root: Path, path: str) -> None:
    assert ModelRoot(root).resolve(path) == root / "one"


def test_an_absolute_path_below_the_root_will_do(root: Path) -> None:
    assert ModelRoot(root).resolve(str(root / "one")) == root / "one"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("one\0", "^path: expected a directory name$"),
        ("x" * 5000, r"^path: expected a directory name \(OSError\)$"),
        ("loop", r"^path: expected a directory"),
        ("../outside", "^path: expected a directory below .*/models$"),
        ("escape", "^path: expected a directory below .*/models$"),
        ("/etc", "^path: expected a directory below .*/models$"),
        ("missing", "^path: expected a directory, .*/models/missing is not one$"),
        ("an-org/a.model", "is not one; `embedq pull an-org/a.model` fetches a model of that name$"),
        ("./a/b", "a/b is not one$"),
        ("a/b/c", "a/b/c is not one$"),
        ("file", "^path: expected a directory, .*/models/file is not one$"),
    ],
)
def test_what_is_not_a_directory_below_the_root_is_rejected(root: Path, path: str, reason: str) -> None:
    with pytest.raises(ModelRejected, match=reason):
        ModelRoot(root).resolve(path)
