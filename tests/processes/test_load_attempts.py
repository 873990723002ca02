"""A load that its process did not survive is found by the next process, and after two such the model is not tried again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedq_consumer.lifecycle import ModelRejected
from embedq_consumer.lifecycle.gates.load_attempts import LoadAttempts
from tests.helpers.support import patient

DIES = """
import os, sys
from pathlib import Path
from embedq_consumer.lifecycle.gates.load_attempts import LoadAttempts
attempt = LoadAttempts(Path(sys.argv[1])).begin(sys.argv[2])
os.abort()
"""


def die(folder: Path, model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(folder), model],
        timeout=patient(60),
        check=False,
        capture_output=True,
    )
    assert done.returncode < 0, done.stderr


def test_two_deaths_are_enough_and_only_for_the_model_that_they_were_of(tmp_path: Path) -> None:
    attempts = LoadAttempts(tmp_path / "loads")
    die(tmp_path / "loads", "one")
    attempts.begin("two").end()
    die(tmp_path / "loads", "one")
    with pytest.raises(ModelRejected, match="it ended the process that loaded it 2 times"):
        attempts.begin("one")
    attempts.begin("two").end()


def test_a_load_that_ends_forgets_the_deaths_before_it(tmp_path: Path) -> None:
    attempts = LoadAttempts(tmp_path)
    die(tmp_path, "one")
    attempts.begin("one").end()
    die(tmp_path, "one")
    attempts.begin("one").end()
    assert list(tmp_path.iterdir()) == []


def test_loads_of_the_same_model_in_living_processes_count_for_nothing(tmp_path: Path) -> None:
    held = [LoadAttempts(tmp_path).begin("one") for _ in range(5)]
    LoadAttempts(tmp_path).begin("one").end()
    for attempt in held:
        attempt.end()
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_noted_every_load_may_begin(tmp_path: Path) -> None:
    LoadAttempts(None).begin("one").end()
    (tmp_path / "file").touch()
    LoadAttempts(tmp_path / "file" / "below").begin("one").end()
