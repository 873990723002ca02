"""The demo can fail: its checks see a lost job, a wrong version and two models that are one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import models
from demo.acts import DemoFailed, Pass, Reloaded, check_answer, check_versions

HERE = Path(models.__file__).parent


def model(version: str, seed: int) -> Pass:
    vectors = np.random.default_rng(seed).normal(size=(4, 32)).astype(np.float32)
    return Pass(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 1.0, 9, 0, version)


OLD, NEW = model("old", 1), model("new", 2)


def reloaded(*answers: tuple[int, Pass, str]) -> Reloaded:
    """(text, the model that made its vector, the version on it) of each job."""
    return Reloaded(
        sent=len(answers),
        texts=[text for text, _, _ in answers],
        vectors=[made.vectors[text] for text, made, _ in answers],
        versions=[version for _, _, version in answers],
    )


def answered(made: Pass, row: int, version: str) -> dict[str, Any]:
    """What the gateway says of one text."""
    item = {"embedding": base64.b64encode(made.vectors[row].tobytes()).decode()}
    return {"data": [item], "model_version": version}


def test_an_answer_over_http_must_be_the_sdks() -> None:
    check_answer(answered(OLD, 0, "old"), OLD)
    with pytest.raises(DemoFailed, match="not the one"):
        check_answer(answered(OLD, 1, "old"), OLD)
    with pytest.raises(DemoFailed, match="expected old"):
        check_answer(answered(OLD, 0, "new"), OLD)


def test_vectors_of_their_own_version_pass() -> None:
    check_versions(reloaded((0, OLD, "old"), (1, OLD, "old"), (0, NEW, "new")), [OLD, NEW])


@pytest.mark.parametrize(
    "found",
    [
        reloaded((0, OLD, "old"), (1, NEW, "old"), (0, NEW, "new")),
        reloaded((0, OLD, "old"), (1, OLD, "new")),
        reloaded((0, OLD, "old"), (1, OLD, "old")),
        reloaded((0, OLD, "old"), (0, NEW, "new"), (0, NEW, "third")),
    ],
    ids=["new model, old label", "old model, new label", "no job after the reload", "unknown version"],
)
def test_a_vector_under_another_version_fails_the_demo(found: Reloaded) -> None:
    with pytest.raises(DemoFailed):
        check_versions(found, [OLD, NEW])


def test_two_models_that_can_not_be_told_apart_fail_the_demo() -> None:
    twin = Pass(OLD.vectors, 1.0, 9, 0, "new")
    with pytest.raises(DemoFailed):
        check_versions(reloaded((0, OLD, "old"), (0, twin, "new")), [OLD, twin])
    with pytest.raises(DemoFailed):
        check_versions(reloaded((0, OLD, "old")), [OLD, OLD])


def test_the_second_model_has_a_prompt_and_the_installed_one_stays_as_it_is(tmp_path: Path) -> None:
    models.prepare(tmp_path)
    first, second = (
        json.loads((tmp_path / name / "config_sentence_transformers.json").read_text("utf-8"))
        for name in (models.FIRST, models.SECOND)
    )
    assert first.get("prompts") is None
    assert second["prompts"][second["default_prompt_name"]] == models.PROMPT
    for name in (models.FIRST, models.SECOND):
        assert (tmp_path / name / "model.safetensors").stat().st_size > 50_000_000


def test_the_sentences_are_many_distinct_and_of_mixed_length() -> None:
    lines = (HERE / "sentences.txt").read_text("utf-8").splitlines()
    assert len(lines) >= 400
    assert len(set(lines)) == len(lines)
    assert all(line == line.strip() and line for line in lines)
    assert sum(len(line) > 350 for line in lines) >= 40
    assert sum(not line.isascii() for line in lines) >= len(lines) // 10
    assert len((HERE / "queries.txt").read_text("utf-8").splitlines()) == 6
