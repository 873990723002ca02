"""Stored texts and the vectors that a model must give for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.gates.golden import check_golden, read_golden
from embedq_shared.golden import Golden, GoldenText
from embedq_shared.messages import SAME_SPACE_COSINE


def written(file: Path, *texts: dict[str, Any], **more: Any) -> Path:
    file.write_text(json.dumps({"texts": list(texts)} | more))
    return file


def vectors(*rows: list[float]) -> Any:
    return np.array(rows, dtype=np.float32)


ONE = {"text": "one", "embedding": [3.0, 4.0]}


def test_a_file_says_texts_vectors_and_how_close_they_must_be(tmp_path: Path) -> None:
    file = written(tmp_path / "golden.json", ONE | {"input_type": "query"}, ONE, made_by="hand")
    found = read_golden(file)
    assert found.min_cosine == 0.995
    assert found.texts == [
        GoldenText(text="one", embedding=[3.0, 4.0], input_type="query"),
        GoldenText(text="one", embedding=[3.0, 4.0]),
    ]
    assert read_golden(written(file, ONE, min_cosine=0.9)).min_cosine == 0.9


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"other": ' + "[" * 100_000, "not valid JSON"),
        ('{"texts": []}', r"length >= 1 - at `\$\.texts`"),
        ('{"texts": [{"text": "one", "embedding": []}]}', "length >= 1"),
        ('{"texts": [{"text": "one", "embedding": ["x"]}]}', "Expected `float`"),
        ('{"texts": [{"text": "one", "embedding": [1], "input_type": "other"}]}', "Invalid enum value"),
        ('{"texts": [{"text": "one", "embedding": [1]}], "min_cosine": 2}', "<= 1"),
        (json.dumps({"texts": [ONE] * 257}), "length <= 256"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "golden.json"
    file.write_text(content)
    with pytest.raises(ModelRejected, match=rf"^golden: .*golden\.json: .*{reason}"):
        read_golden(file)


def test_a_pipe_or_a_file_of_any_size_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"^golden: .*/none: missing"):
        read_golden(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelRejected, match="it is a named pipe"):
        read_golden(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelRejected, match="expected at most 4,194,304 bytes"):
        read_golden(tmp_path / "sparse")


def golden(*embeddings: list[float], min_cosine: float = SAME_SPACE_COSINE) -> Golden:
    return Golden(
        texts=[GoldenText(text="text", embedding=each) for each in embeddings], min_cosine=min_cosine
    )


def test_vectors_of_the_same_direction_pass_and_shorter_ones_are_compared_with_the_cut() -> None:
    check_golden(golden([3.0, 4.0], [0.0, 5.0, 5.0]), vectors([0.6, 0.8, 0.1], [0.0, 0.7, 0.7]), None)


@pytest.mark.parametrize(
    ("wanted", "given", "min_cosine", "reason"),
    [
        (golden([1.0, 0.0], [3.0, 4.0]), [[1.0, 0.0], [0.8, 0.6]], None, r"texts\[1\]: .* 0\.995 .*0\.9600"),
        (golden([3.0, 4.0]), [[0.8, 0.6]], 0.97, r"texts\[0\]: expected a cosine of at least 0\.97 "),
        (golden([3.0, 4.0], min_cosine=0.99), [[0.8, 0.6]], None, r"at least 0\.99 "),
        (golden([3.0, 4.0, 0.0]), [[0.6, 0.8]], None, "vectors of 3 dimensions, the model gives 2"),
        (golden([0.0, 0.0]), [[0.6, 0.8]], None, r"got 0\.0000"),
        (golden([1.0, 0.0]), [[float("nan"), 0.0]], None, "got nan"),
    ],
)
def test_a_vector_that_is_another_one_is_refused_with_its_number(
    wanted: Golden, given: list[list[float]], min_cosine: float | None, reason: str
) -> None:
    with pytest.raises(ModelRejected, match=rf"^golden: .*{reason}"):
        check_golden(wanted, vectors(*given), min_cosine)


def test_the_commands_threshold_wins() -> None:
    check_golden(golden([3.0, 4.0], min_cosine=0.99), vectors([0.8, 0.6]), 0.95)
