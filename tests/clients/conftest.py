"""The real MiniLM behind a real Kafka and a real gateway, for clients that know nothing of embedq, and for embedq's adapters.

For each file, as in `tests/broker/gateway`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import pytest_asyncio

from embedq_sdk.blocking import EmbedClient
from embedq_sdk.dev import DevStack
from embedq_sdk.embeddings import Vectors
from embedq_shared.topics import Topics
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.support import patient
from tests.helpers.tiny_models import minilm_path

TEXTS = ["the tide turns twice a day", "la lune tourne", "月は地球の周りを回る", "", "x " * 100]
ALIAS = "default"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def topics(stack: DevStack) -> Topics:
    return await make_topics(stack, fresh_prefix())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(
    stack: DevStack, topics: Topics, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    """A gateway without keys, and one replica."""
    logs = tmp_path_factory.mktemp("clients")
    replica = Replica(stack, topics, minilm_path(), logs / "replica.log", redis=False, deterministic="true")
    async with (
        replicas(replica),
        running(GatewayProcess(stack, topics, logs / "gateway.log", files=logs / "files")) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def url(gateway: GatewayProcess) -> str:
    """The gateway's address, without a path."""
    assert gateway.url is not None
    return gateway.url


@pytest.fixture(scope="module")
def v1(url: str) -> str:
    """What OpenAI's clients take as their base URL."""
    return f"{url}/v1"


@pytest.fixture(scope="module")
def embedq(gateway: GatewayProcess, stack: DevStack, topics: Topics) -> Iterator[EmbedClient]:
    """The SDK, past the gateway."""
    with EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix, connect_timeout=patient(10)) as client:
        yield client


@pytest.fixture(scope="module")
def expected(embedq: EmbedClient) -> Vectors:
    """The vectors of TEXTS."""
    return embedq.embed(TEXTS, timeout=patient(60))


def same_bits(found: object, expected: Vectors) -> bool:
    """Whether numbers, perhaps of a client that keeps them as Python's floats, are these vectors to the last bit."""
    exact = np.asarray(found, dtype=np.float64)
    return exact.shape == expected.shape and bool((exact == expected.astype(np.float64)).all())
