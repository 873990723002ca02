"""The client while Kafka is away: never a hang, always a clear error, and work goes on when it is back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
            await within(patient(1.5), embedq.embed("x", timeout=patient(1.5)))
            await within(patient(1.5), embedq.submit("x", timeout=patient(1.5)))
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
            await within(patient(1.5), embedq.embed("impatient", timeout=patient(1.5)))
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


async def test_leaving_the_block_with_kafka_gone_gives_the_error_that_caused_it(own_stack: DevStack) -> None:
    """aiokafka's own consumer ends its `stop` with CancelledError here, which no `except` of a caller's catches."""

    async def work(entered: asyncio.Semaphore, gone: asyncio.Event, timeout: float) -> str:
        # The broker may have been started a moment ago, by the test before.
        embedq = EmbedClient(own_stack.kafka_servers, connect_timeout=patient(30))
        try:
            await embedq.open()
        finally:
            entered.release()  # also where it fails, since it says why only when it is awaited
        try:
            async with embedq:
                await gone.wait()
                await embedq.embed("x", timeout=timeout)
        except KafkaUnavailable as error:
            return str(error)
        raise AssertionError("no error")

    entered, gone = asyncio.Semaphore(0), asyncio.Event()
    # A broker that says nothing for 1.2 s is gone; before that the client cannot know.
    working = [asyncio.create_task(work(entered, gone, patient(2) + 0.2 * n)) for n in range(1, 7)]
    for _ in working:
        await entered.acquire()
    await asyncio.to_thread(own_stack.stop_kafka, kill=True)
    try:
        gone.set()
        told = await asyncio.gather(*working)
    finally:
        await asyncio.to_thread(own_stack.start_kafka)
    assert all(own_stack.kafka_servers in each for each in told)


def test_a_program_with_kafka_gone_writes_nothing_by_itself(own_stack: DevStack) -> None:
    """Only what the program prints is on its streams; whoever wants aiokafka's log configures logging."""
    program = """
import asyncio, logging, sys
from embedq_sdk import EmbedClient, EmbedError

if sys.argv[3:] == ["log"]:
    logging.basicConfig(level=logging.WARNING)

async def main():
    async with EmbedClient(sys.argv[1]) as client:
        print("in", flush=True)
        sys.stdin.readline()
        for _ in range(2):
            try:
                await client.embed("x", timeout=float(sys.argv[2]))
            except EmbedError as error:
                print(type(error).__name__, flush=True)

asyncio.run(main())
"""

    def run(*more: str) -> tuple[str, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, own_stack.kafka_servers, f"{patient(3):.1f}", *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        own_stack.stop_kafka(kill=True)
        try:
            return process.communicate("\n", timeout=patient(60))
        finally:
            own_stack.start_kafka()

    assert run() == ("KafkaUnavailable\nKafkaUnavailable\n", "")
    told, logged = run("log")
    assert told == "KafkaUnavailable\nKafkaUnavailable\n"
    assert "aiokafka" in logged


async def test_a_command_whose_kafka_goes_away_ends_with_its_exit_code(
    own_stack: DevStack, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"text {n}\n" for n in range(5_000)))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from embedq_sdk.cli import main; main()"),
        *("embed", "--file", str(texts), "--in-flight", "64", "--timeout", f"{patient(3):.1f}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"EMBEDQ_KAFKA_SERVERS": own_stack.kafka_servers},
    )
    assert process.stdout is not None
    async with Responder(own_stack.kafka_servers):
        await process.stdout.readline()
    await asyncio.to_thread(own_stack.stop_kafka, kill=True)
    try:
        async with asyncio.timeout(patient(60)):
            _, told = await process.communicate()
    finally:
        await asyncio.to_thread(own_stack.start_kafka)
    assert process.returncode == 3, told
    assert told.startswith(f"embedq: Kafka at {own_stack.kafka_servers} does not answer".encode())
    assert told.count(b"\n") == 1
