"""Ways to break a reload, with the real loader and without a broker: which step finds each, what is told, and the old model serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from embedq_consumer.engine import LoadOptions
from embedq_consumer.opening import ModelLoader
from tests.helpers.bad_models import copied
from tests.helpers.broken_reloads import WAYS
from tests.helpers.fake_models import Bench, command
from tests.helpers.support import patient
from tests.helpers.tiny_models import make_tiny_bert
from tests.helpers.warm_start import start_dry_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("good") / "old", seed=1, hidden=256, layers=6)


@pytest_asyncio.fixture
async def bench(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """The good model serves, and a job has asked for 64 dimensions of it."""
    await asyncio.to_thread(start_dry_runs, monkeypatch)
    root = tmp_path / "models"
    copied(good, root / "old")
    copied(good, tmp_path / "outside")
    options = LoadOptions(
        device="cpu",
        threads=1,
        root=root.resolve(),
        known_models=good.parent / "known",
        dry_run_s=patient(120),
    )
    made = Bench(root, {}, load_timeout_s=600, loader=ModelLoader(options))
    await made.model.start(None)
    made.model.note_dimensions(64)
    yield made
    await asyncio.to_thread(made.model.close)


@pytest.mark.parametrize("name", WAYS)
async def test_each_is_found_in_its_step_with_its_reason_and_the_old_model_serves(
    good: Path, bench: Bench, name: str
) -> None:
    way = WAYS[name]
    way.make(good, bench.root / name)
    before = bench.model.slot.loaded
    # The reload that would give the old model up first.
    asked = {"policy": "resource_preserving"} | way.asked
    await bench.follow([command(1, way.path or name, **asked)])
    last = bench.sent[-1]
    assert (last.state, last.step) == ("FAILED", way.step), last.error
    assert way.told in (last.error or "")
    assert (bench.serving, last.model_version) == ("old", before.encoder.model_version)
    assert (bench.model.slot.loaded is before) == (way.step == "validate"), "given up for nothing"
