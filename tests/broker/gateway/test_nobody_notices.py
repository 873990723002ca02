"""Two hundred requests in flight, none of them tried again by its client, while a replica is killed, and while the model changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.command_line import run_embedq
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.lazily import lazily
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.support import patient, wait_until
from tests.helpers.tiny_models import make_tiny_bert

if TYPE_CHECKING:
    import openai
else:
    openai = lazily("openai")

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

IN_FLIGHT: Final = 200


class Load:
    """Callers that each ask again as soon as they are answered."""

    def __init__(self) -> None:
        self.versions: Counter[str] = Counter()
        self.failed: list[openai.OpenAIError] = []
        self.in_flight = 0
        self.stopped = False

    async def call_forever(self, client: openai.AsyncOpenAI, name: int) -> None:
        number = 0
        while not self.stopped:
            number += 1
            self.in_flight += 1
            try:
                found = await client.embeddings.create(model="default", input=f"caller {name}, text {number}")
                self.versions[(found.model_extra or {})["model_version"]] += 1
            except openai.OpenAIError as error:
                self.failed.append(error)
            finally:
                self.in_flight -= 1

    async def answered(self, more: int) -> None:
        """Wait until so many more are answered."""
        goal = self.versions.total() + more
        await wait_until(
            lambda: self.versions.total() >= goal or bool(self.failed), within=120, what="answers"
        )


@asynccontextmanager
async def load_on(gateway: GatewayProcess) -> AsyncIterator[Load]:
    """Two hundred callers. In the end each of them has its last answer."""
    load = Load()
    client = openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=patient(120)
    )
    async with client, asyncio.timeout(patient(300)), asyncio.TaskGroup() as callers:
        for name in range(IN_FLIGHT):
            callers.create_task(load.call_forever(client, name))
        try:
            await load.answered(2 * IN_FLIGHT)
            yield load
        finally:
            load.stopped = True


async def test_a_replica_is_killed_and_every_request_is_answered(
    stack: DevStack, model: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    dying, living = (Replica(stack, topics, model, tmp_path / f"{n}.log", redis=False) for n in (1, 2))
    async with (
        replicas(dying, living),
        running(GatewayProcess(stack, topics, tmp_path / "g.log")) as gateway,
        load_on(gateway) as load,
    ):
        assert load.in_flight == IN_FLIGHT
        dying.kill()
        await dying.ended()
        await load.answered(2 * IN_FLIGHT)

    assert load.failed == []
    assert len(load.versions) == 1


async def test_the_model_is_reloaded_and_every_request_is_answered_by_the_one_or_the_other(
    stack: DevStack, model: Path, tmp_path: Path
) -> None:
    other = make_tiny_bert(model.parent / "b", seed=2, hidden=256, max_tokens=128)
    topics = await make_topics(stack, fresh_prefix())
    environ = {"EMBEDQ_KAFKA_SERVERS": stack.kafka_servers, "EMBEDQ_TOPIC_PREFIX": topics.prefix}
    both = [Replica(stack, topics, model, tmp_path / f"{n}.log", redis=False) for n in (1, 2)]
    async with (
        replicas(*both),
        running(GatewayProcess(stack, topics, tmp_path / "g.log")) as gateway,
        load_on(gateway) as load,
    ):
        done = await run_embedq("reload", str(other), environ=environ, within=patient(120))
        await load.answered(2 * IN_FLIGHT)

    assert done.code == 0, done.err
    assert load.failed == []
    assert len(load.versions) == 2
