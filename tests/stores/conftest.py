"""Real vector stores: a PostgreSQL process with pgvector, and what runs in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import postgres as helper


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    with helper.postgres() as server:
        yield server
