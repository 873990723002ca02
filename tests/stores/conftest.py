"""Real vector stores: a PostgreSQL process with pgvector, and what runs in the test's own process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import postgres as helper


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    with helper.postgres() as server:
        yield server


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: Qdrant's local mode waits for the disk after each point."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)
