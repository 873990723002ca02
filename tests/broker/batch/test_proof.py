"""The proof of `benchmarks.batch_run` in small: everything is killed once, and every row has its vector, once."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Final

import pytest

from benchmarks.batch_run import measured
from embedq_sdk.dev import DevStack

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(900)]


ROWS: Final = 20_000
"""Of fewer nothing is left to do when the second and third are to be killed."""


def test_a_table_whose_runner_replica_and_broker_are_killed_has_each_vector_once(tmp_path: Path) -> None:
    options = Namespace(rows=ROWS, distinct=ROWS, replicas=2, redis=False, rounds=0, kills=True, seed=3)
    with DevStack() as stack:
        found = asyncio.run(measured(stack, options, tmp_path))

    assert found["exit_code"] == 0, found["said"]
    assert {each["victim"] for each in found["killed"]} == {"runner", "replica", "broker"}
    assert found["ids"] == ROWS
    assert found["ids_once"]
    assert found["wrong_vectors"] == 0
    assert len(found["model_versions"]) == 1
