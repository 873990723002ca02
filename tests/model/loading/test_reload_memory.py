"""Reloads leave nothing behind: a process holds after ten what it held after the first one."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from embedq_shared.messages import Policy
from tests.helpers.bad_models import copied
from tests.helpers.many_reloads import Held
from tests.helpers.support import patient
from tests.helpers.tiny_models import make_tiny_qwen3, minilm_path

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

RELOADS = 11


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, and the same with another word embedding: 90 MB each, of which many tensors share a heap."""
    root = tmp_path_factory.mktemp("minilm")
    copied(minilm_path(), root / "old")
    new = copied(minilm_path(), root / "new")
    tensors = load_file(new / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][1000] *= -1
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Qwen3s of six layers: 90 MB each, too."""
    root = tmp_path_factory.mktemp("qwen3")
    for seed, name in enumerate(("old", "new")):
        make_tiny_qwen3(root / name, seed=seed, hidden=768, layers=6)
    return root


@pytest.mark.parametrize("models", ["minilm", "qwen3"])
@pytest.mark.parametrize("policy", ["availability_preserving", "resource_preserving"])
def test_after_ten_more_reloads_a_process_holds_what_it_held_after_the_first(
    models: str,
    policy: Policy,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    root: Path = request.getfixturevalue(models)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.many_reloads", str(root), str(RELOADS), policy],
        stdout=subprocess.PIPE,
        check=True,
        timeout=patient(300),
    )
    found = msgspec.json.decode(ran.stdout.splitlines()[-1], type=list[Held])
    record_property("held", msgspec.to_builtins(found))
    assert len(found) == RELOADS
    in_use = [each.in_use for each in found if each.in_use is not None]
    assert all(each <= 1.01 * in_use[0] for each in in_use), megabytes(in_use)
    anonymous = [each.anonymous for each in found]
    # By the median of three: where two threads of a load happen to share a heap, that one model's memory has holes of a few megabytes.
    assert statistics.median(anonymous[-3:]) <= 1.01 * anonymous[0], megabytes(anonymous)


def megabytes(sizes: Sequence[int]) -> list[str]:
    return [f"{size / 1e6:.1f} MB" for size in sizes]
