"""The disk of one broker of three is full, where a small one can be mounted: what Kafka does then stops no worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import checker, history, load
from tests.faults.reference import expected
from tests.faults.run import Harness, Plan
from tests.helpers.cluster import Cluster
from tests.helpers.small_disk import SmallDisk, small_disk
from tests.helpers.tiny_models import make_tiny_bert

pytestmark = [pytest.mark.kafka, pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", mib=96) as mounted:
        if mounted is None:
            pytest.skip("a small disk cannot be mounted here")
        yield mounted


@pytest.fixture
def cramped(disk: SmallDisk) -> Iterator[Cluster]:
    """A cluster whose second broker has a disk of 96 MiB."""
    with Cluster(min_insync=2, disks={2: disk}) as running:
        yield running


def test_a_full_disk_takes_no_byte_more_until_it_is_emptied(disk: SmallDisk) -> None:
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        (disk.path / "more").write_bytes(bytes(5000))
    disk.empty()
    (disk.path / "more").write_bytes(bytes(5000))


async def test_a_broker_whose_disk_is_full_costs_no_job(cramped: Cluster, tmp_path: Path) -> None:
    plan = Plan(seed=5, jobs=1500, faults=("broker_disk_full",), texts=100, window=500, workers=2)
    models = [make_tiny_bert(tmp_path / "models" / "a", seed=1, max_tokens=512)]
    vectors = await asyncio.to_thread(expected, models, load.texts(plan.seed, plan.texts), tmp_path)
    lines: list[str] = []
    harness = Harness(plan, cramped, models, vectors, tmp_path, say=lines.append)
    path = await harness.run()
    verdict = checker.check(history.read(path))
    assert not verdict.breaches, "\n".join([*lines, checker.report(path, verdict)])
    assert "No space left" in (cramped.directory / "kafka-2.log").read_text()
