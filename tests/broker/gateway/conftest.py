"""A service and a gateway for each file, in front of the session's Kafka: they start in a second, and such as waited for the session's
end would take a tenth of a processor meanwhile, most of it Kafka's. Tests that stop or kill start their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.tiny_models import make_tiny_bert

HIDDEN = 256
MAX_TOKENS = 128


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, whose forward needs no transformers."""
    return make_tiny_bert(
        tmp_path_factory.mktemp("gateway-models") / "a", hidden=HIDDEN, max_tokens=MAX_TOKENS
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def topics(stack: DevStack) -> Topics:
    return await make_topics(stack, fresh_prefix())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replica(
    stack: DevStack, topics: Topics, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replica]:
    """A service with that model."""
    log = tmp_path_factory.mktemp("gateway-replica") / "replica.log"
    async with replicas(Replica(stack, topics, model, log, redis=False)) as (started,):
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(
    stack: DevStack, topics: Topics, replica: Replica, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    """A gateway without keys, that keeps files and runs batches."""
    folder = tmp_path_factory.mktemp("gateway")
    files = folder / "files"
    async with running(GatewayProcess(stack, topics, folder / "gateway.log", files=files)) as started:
        yield started
