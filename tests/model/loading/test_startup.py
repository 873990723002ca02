"""The benchmark of starts tells where all the time went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.startup import reading, start


def test_the_steps_of_a_start_account_for_its_time(
    model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = start(model_path("qwen3"), "none", tmp_path / "compiled")
    assert found["engine"] == "float32"
    steps = list(found["steps"])
    assert steps[:2] == ["python", "torch"]
    assert {"weights", "proof", "graphs"} <= set(steps)
    assert steps[-2:] == ["warm up", "one text"]
    assert all(seconds >= 0 for seconds in found["steps"].values())
    own = {"python", "torch", "engine", "warm up", "one text"}
    outside = sum(seconds for step, seconds in found["steps"].items() if step in own)
    assert outside + found["load"] == pytest.approx(found["ready"])
    assert sum(found["steps"].values()) - outside <= found["load"]


def test_all_weights_are_read(model_path: Callable[[str], Path]) -> None:
    model = model_path("qwen3")
    found = reading(model)
    assert found["gb"] * 1e9 == pytest.approx(
        sum(file.stat().st_size for file in model.glob("*.safetensors"))
    )
    assert found["memory"] > 0
    assert found["disk"] > 0
