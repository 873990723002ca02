"""The blocking client in Ray's tasks and map functions, with Ray itself. It is larger than all of the suite's packages but PyTorch, so
it is no part of the set-up: `pip install 'ray[data]'` for this test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from embedq_sdk.dev import DevStack
from embedq_sdk.embeddings import Vectors
from embedq_shared.topics import Topics
from tests.clients.conftest import TEXTS, same_bits
from tests.helpers.support import patient

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"),
]

NOT_STARTED = 3
PROGRAM = Path(__file__).with_name("on_ray.py")


def test_tasks_and_map_functions(stack: DevStack, topics: Topics, expected: Vectors, tmp_path: Path) -> None:
    environ = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), stack.kafka_servers, topics.prefix, f"{patient(60):.0f}", *TEXTS],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patient(180),
        check=False,
    )
    if done.returncode == NOT_STARTED:
        pytest.skip(f"Ray did not start on this machine: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert same_bits(found["tasks"], expected)
    assert same_bits(found["rows"], expected)
