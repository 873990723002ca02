"""The short mix: real workers, three real brokers and a real Redis, a few faults, and the checker's judgment of it all.

The long one is `make faults`. A seed that failed is told again by FAULTS_SEED=… .
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from tests.faults import checker, history, load
from tests.faults.history import Mode
from tests.faults.reference import expected
from tests.faults.run import Harness, Plan
from tests.helpers.cluster import Cluster
from tests.helpers.tiny_models import make_tiny_bert

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = ("kill", "kill_at", "broker_killed", "broker_cut", "redis_killed", "redis_frozen")


@pytest.fixture
def seed() -> int:
    """CI judges a change, so it meets the same faults before and after it; everywhere else others come each time."""
    return int(os.environ.get("FAULTS_SEED", 10 if "CI" in os.environ else random.randrange(10**6)))


@pytest.mark.parametrize("mode", ["at-least-once", pytest.param("exactly-once", marks=pytest.mark.soak)])
async def test_kills_a_lost_broker_and_a_lost_redis_lose_no_job_and_repeat_within_the_bound(
    cluster: Cluster, seed: int, mode: Mode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = SHORT if mode == "at-least-once" else (*SHORT, "kill_in_transaction")
    plan = Plan(seed=seed, jobs=2000, mode=mode, faults=faults, texts=200, window=500)
    models = [make_tiny_bert(tmp_path / "models" / "a", seed=1, max_tokens=512)]
    vectors = await asyncio.to_thread(expected, models, load.texts(plan.seed, plan.texts), tmp_path)
    lines: list[str] = []
    harness = Harness(plan, cluster, models, vectors, tmp_path, say=lines.append)
    try:
        path = await harness.run()
    except* AssertionError as group:
        path = harness.history.path
        lines.append(f"it did not settle: {group.exceptions[0]}")
    verdict = checker.check(history.read(path))
    told = "\n".join([f"FAULTS_SEED={seed}", *lines, checker.report(path, verdict)])
    assert not verdict.breaches, told
    assert sum(worker.ends.count(-9) for worker in harness.workers) >= 1, told
    with capsys.disabled():
        print(f"\n{told}" if "FAULTS_SHOW" in os.environ else "")  # noqa: T201
