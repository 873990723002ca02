"""A bench that ends its threads after the test, and commands that hardly wait for more of a burst."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq_consumer.lifecycle import desired_model
from tests.helpers.fake_models import Bench, FakeModel, MakeBench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Make a bench with these models; `old` is the configured one, unless it is given."""
    made: list[Bench] = []

    def make(stall_timeout_s: float = 600.0, **models: list[FakeModel | BaseException]) -> Bench:
        models.setdefault("old", [FakeModel()])
        made.append(Bench(tmp_path, models, stall_timeout_s=stall_timeout_s))
        return made[-1]

    yield make
    for one in made:
        one.model.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that takes another one's place waits for more of a burst, but not for long: for tests that write no more than
    those two."""
    monkeypatch.setattr(desired_model, "_QUIET_S", 0.05)
