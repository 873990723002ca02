"""Reloads leave nothing behind: a process holds after ten what it held after the first ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from embedq_shared.messages import Policy
from tests.helpers.bad_models import copied
from tests.helpers.support import patient
from tests.helpers.tiny_models import minilm_path

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

RELOADS = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, and the same with another word embedding: 90 MB each."""
    root = tmp_path_factory.mktemp("models")
    copied(minilm_path(), root / "old")
    new = copied(minilm_path(), root / "new")
    tensors = load_file(new / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][1000] *= -1
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("policy", ["availability_preserving", "resource_preserving"])
def test_after_ten_more_reloads_a_process_holds_what_it_held_after_the_first_ones(
    root: Path, policy: Policy, record_property: Callable[[str, object], None]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.many_reloads", str(root), str(RELOADS), policy],
        stdout=subprocess.PIPE,
        check=True,
        timeout=patient(300),
    )
    held = json.loads(ran.stdout.splitlines()[-1])
    record_property("held", held)
    assert len(held) == RELOADS
    # What the allocator keeps in hand goes up and down by some per cent (24 reloads: 713 to 772 MB, and 726 after the last),
    # a leak only up: two megabytes a reload are found, of a model of 90.
    assert min(held[-3:]) <= 1.01 * max(held[:3]), [f"{each / 1e6:.1f} MB" for each in held]
