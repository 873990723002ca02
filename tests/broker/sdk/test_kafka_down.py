"""The client while Kafka is away: never a hang, always a clear error, and work goes on when it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest

from embedq_sdk import DeadlineExceeded, EmbedClient, EmbedError, KafkaUnavailable
from embedq_sdk.admin.control import reload_model, service_status
from embedq_sdk.admin.topics import create_topics
from embedq_sdk.dev import DevStack
from embedq_sdk.dev.ports import free_ports
from tests.helpers.fake_service import expected
from tests.helpers.programs import own_environ
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

SLACK_S = 3.0
"""A deadline is kept if the error is there this soon after it, on a machine with other work."""


@pytest.fixture(scope="module")
def own_stack() -> Iterator[DevStack]:
    """A broker of this module's own: its tests stop and pause it."""
    with DevStack(environ=own_environ()) as stack:
        asyncio.run(create_topics(stack.kafka_servers, partitions=2, reply_partitions=2))
        yield stack


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


async def within(seconds: float, work: object) -> None:
    started = time.monotonic()
    with pytest.raises(KafkaUnavailable):
        await work  # type: ignore[misc]
    assert time.monotonic() - started < seconds + patient(SLACK_S)


async def test_entering_without_kafka_names_the_servers(nobody: str) -> None:
    started = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=nobody):
        async with EmbedClient(nobody, connect_timeout=1.0):
            pass
    assert time.monotonic() - started < 1.0 + patient(SLACK_S)


async def test_nothing_of_the_sdk_hangs_without_kafka(nobody: str) -> None:
    await within(1, create_topics(nobody, connect_timeout=1.0))
    await within(1, service_status(nobody, connect_timeout=1.0))
    await within(1, anext(reload_model(nobody, "/model", connect_timeout=1.0)))


async def test_a_broker_that_accepts_and_never_answers_is_unavailable(own_stack: DevStack) -> None:
    await asyncio.to_thread(own_stack.pause_kafka)
    try:
        await within(1, EmbedClient(own_stack.kafka_servers, connect_timeout=1.0).__aenter__())
        await within(1, create_topics(own_stack.kafka_servers, connect_timeout=1.0))
    finally:
        await asyncio.to_thread(own_stack.resume_kafka)


async def test_a_pause_of_kafka_ends_calls_at_their_deadline_and_later_ones_work(own_stack: DevStack) -> None:
    async with Responder(own_stack.kafka_servers), EmbedClient(own_stack.kafka_servers) as embedq:
        await embedq.embed("before")
        await asyncio.to_thread(own_stack.pause_kafka)
        try:
            await within(1.5, embedq.embed("x", timeout=1.5))
            await within(1.5, embedq.submit("x", timeout=1.5))
        finally:
            await asyncio.to_thread(own_stack.resume_kafka)

        assert np.array_equal(await embedq.embed("after", timeout=patient(30)), expected("after"))
        assert embedq.in_flight == 0


async def test_a_call_with_time_left_survives_a_restart_of_kafka(own_stack: DevStack) -> None:
    async with Responder(own_stack.kafka_servers), EmbedClient(own_stack.kafka_servers) as embedq:
        await embedq.embed("before")
        await asyncio.to_thread(own_stack.stop_kafka, kill=True)
        try:
            waiting = [
                asyncio.create_task(embedq.embed(f"patient {n}", timeout=patient(60))) for n in range(20)
            ]
            await within(1.5, embedq.embed("impatient", timeout=1.5))
        finally:
            await asyncio.to_thread(own_stack.start_kafka)
        vectors = await asyncio.gather(*waiting)

        assert np.array_equal(np.stack(vectors), np.stack([expected(f"patient {n}") for n in range(20)]))
        assert embedq.in_flight == 0


async def test_a_stream_goes_on_after_a_restart_of_kafka(own_stack: DevStack) -> None:
    async with Responder(own_stack.kafka_servers), EmbedClient(own_stack.kafka_servers) as embedq:
        seen = 0
        stream = embedq.stream((str(n) for n in range(3000)), batch_size=2, in_flight=50, timeout=patient(60))
        async for item in stream:
            assert item.index == seen
            assert item.vector is not None
            assert np.array_equal(item.vector, expected(item.text))
            seen += 1
            if seen == 1000:
                await asyncio.to_thread(own_stack.stop_kafka, kill=True)
                await asyncio.to_thread(own_stack.start_kafka)

        assert seen == 3000


async def test_closing_ends_soon_while_kafka_is_away(own_stack: DevStack) -> None:
    async with Responder(own_stack.kafka_servers) as responder:
        responder.behave = lambda job: None
        embedq = await EmbedClient(own_stack.kafka_servers).__aenter__()
        waiting = [asyncio.create_task(embedq.embed(str(n))) for n in range(5)]
        await wait_until(lambda: len(responder.received) == 5, what="the jobs")
        await asyncio.to_thread(own_stack.pause_kafka)
        try:
            unsent = asyncio.create_task(embedq.embed("never sent"))
            await wait_until(lambda: embedq.in_flight == 6, what="the last call")
            async with asyncio.timeout(patient(10)):
                await embedq.close()
            ended = await asyncio.gather(*waiting, unsent, return_exceptions=True)
        finally:
            await asyncio.to_thread(own_stack.resume_kafka)

    assert all(isinstance(end, EmbedError) and not isinstance(end, DeadlineExceeded) for end in ended)
