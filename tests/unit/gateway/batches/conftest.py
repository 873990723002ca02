"""Storages for the tests of what stands on them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from embedq_gateway.batches.storage import Objects, StorageAddress, prepare, storage_at


@pytest.fixture
async def objects(tmp_path: Path) -> AsyncIterator[Objects]:
    """A directory."""
    storage = storage_at(StorageAddress.of(str(tmp_path / "files")))
    await prepare(storage, "test")
    yield storage
    await storage.close()
