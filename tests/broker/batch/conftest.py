from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from tests.helpers import postgres as helper


@pytest.fixture(scope="session")
def servers(stack: DevStack) -> str:
    return stack.kafka_servers


@pytest.fixture(scope="session")
def prefix(servers: str) -> str:
    """Topics of these tests alone."""
    name = f"batch-{uuid.uuid4().hex[:8]}"
    asyncio.run(create_topics(servers, prefix=name, partitions=4, reply_partitions=2))
    return name


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL that connectors can follow."""
    with helper.postgres(logical=True) as server:
        yield server
