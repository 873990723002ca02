"""Redis for these tests: one that stays, and one to mistreat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.redis_process import RedisProcess


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def redis(shared_redis: RedisProcess) -> RedisProcess:
    """Empty, with its counters at zero."""
    shared_redis.command("FLUSHALL")
    shared_redis.command("CONFIG", "RESETSTAT")
    return shared_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """Started; may be frozen and killed."""
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.kill()
