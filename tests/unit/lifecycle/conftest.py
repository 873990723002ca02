"""A bench that ends its threads after the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
