from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest

from embedq_sdk import EmbedClient
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from tests.helpers.command_line import Done, Run, run_embedq
from tests.helpers.responder import Responder


@pytest.fixture(scope="session")
def servers(stack: DevStack) -> str:
    return stack.kafka_servers


@pytest.fixture(scope="session")
def prefix(servers: str) -> str:
    """Topics of these tests alone, with few reply partitions so that clients share them."""
    name = f"sdk-{uuid.uuid4().hex[:8]}"
    asyncio.run(create_topics(servers, prefix=name, partitions=4, reply_partitions=2))
    return name


@pytest.fixture
def client(servers: str, prefix: str) -> Callable[..., EmbedClient]:
    return lambda **settings: EmbedClient(servers, topic_prefix=prefix, **settings)


@pytest.fixture
def responder(servers: str, prefix: str) -> Callable[..., Responder]:
    return lambda **settings: Responder(servers, prefix, **settings)


@pytest.fixture
def embedq(servers: str, prefix: str) -> Run:
    async def run(*arguments: str, stdin: str | bytes = "", **environ: str) -> Done:
        settings = {"EMBEDQ_KAFKA_SERVERS": servers, "EMBEDQ_TOPIC_PREFIX": prefix}
        return await run_embedq(*arguments, environ=settings | environ, stdin=stdin)

    return run
