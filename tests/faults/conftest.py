"""A cluster for the tests that break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three brokers and a Redis behind proxies, of this module alone."""
    with Cluster(min_insync=2) as running:
        yield running
        running.check()
