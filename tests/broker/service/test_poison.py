"""Jobs that kill the process, each time: counted across crashes, dead-lettered at last, and nobody else with them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import Topics
from tests.helpers.service_process import (
    Reader,
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
    supervised,
)
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]

PARTITIONS = 4
DEADLY = ["-m", "tests.helpers.deadly_model"]


class Stream:
    """Innocent jobs, a few each tick, on all partitions of both lanes; when each was sent and answered."""

    def __init__(self, client: AIOKafkaProducer, topics: Topics, results: Reader) -> None:
        self._client = client
        self._topics = topics
        self._results = results
        self._seen = 0
        self.sent: dict[str, float] = {}
        self.answered: dict[str, float] = {}
        self.errors: list[dict[str, object]] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for partition in range(PARTITIONS):
                for lane in self._topics.lanes:
                    id = f"innocent-{len(self.sent)}"
                    self.sent[id] = time.monotonic()
                    body = json.dumps({"input": f"text of {id}", "dimensions": 32, "id": id})
                    await self._client.send(lane, body.encode(), partition=partition)
            await asyncio.sleep(0.1)

    async def look(self) -> None:
        """Note the answers that have come since."""
        records = await self._results.all()
        now = time.monotonic()
        for record in records[self._seen :]:
            answer = json.loads(record.value)
            self.answered.setdefault(answer["id"], now)
            if answer["object"] == "error":
                self.errors.append(answer)
        self._seen = len(records)

    async def all_answered(self) -> None:
        async def done() -> bool:
            await self.look()
            return self.sent.keys() <= self.answered.keys()

        await wait_until(done, within=120.0, what="an answer for each innocent job")


@asynccontextmanager
async def streaming(stream: Stream) -> AsyncIterator[None]:
    sending = asyncio.create_task(stream.run())
    try:
        yield
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending


@pytest.mark.parametrize("word", ["tokenizer-kill", "segfault", "device-kill", "device-lost"])
async def test_a_job_that_kills_the_process_is_dead_lettered_with_its_history_and_the_others_are_answered(
    stack: DevStack,
    models: Path,
    tmp_path: Path,
    word: str,
    record_property: Callable[[str, object], None],
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=PARTITIONS)
    two = [
        Replica(
            stack, topics, models / "a", tmp_path / f"log{n}", redis=False, python=DEADLY, replica=f"r{n}"
        )
        for n in (0, 1)
    ]
    async with (
        supervised(*two) as ends,
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.replies) as replies,
        reader(stack, topics.dead_letters) as letters,
    ):
        stream = Stream(client, topics, results)
        async with streaming(stream):
            await wait_until(lambda: len(stream.sent) > 100, what="some jobs")
            guilty = await client.send_and_wait(
                topics.jobs,
                json.dumps({"input": ["fine", f"a {word}"], "id": "guilty"}).encode(),
                partition=1,
                headers=[("correlation-id", b"c"), ("reply-topic", topics.replies.encode())],
            )

            async def condemned() -> bool:
                await stream.look()
                return bool(await letters.all())

            await wait_until(condemned, within=150.0, what="a dead letter")
            deaths = len(ends)
        await stream.all_answered()
        [letter] = await letters.all()
        assert (letter.partition, json.loads(letter.value)["id"]) == (1, "guilty")
        assert value_of(letter.headers, "embedq-error-code") == b"crashed"
        assert value_of(letter.headers, "embedq-attempts") == b"4"
        assert value_of(letter.headers, "kafka_dlt-original-offset") == guilty.offset.to_bytes(8, "big")
        history = json.loads(value_of(letter.headers, "embedq-history") or b"")
        assert [death["replica"] in ("r0", "r1") for death in history] == [True] * 4
        assert sorted(death["at"] for death in history) == [death["at"] for death in history]
        [reply] = await replies.until(1)
        answer = json.loads(reply.value)
        assert (answer["error"]["code"], answer["error"]["retryable"]) == ("crashed", False)
        assert value_of(reply.headers, "correlation-id") == b"c"
        assert stream.errors == []
        assert deaths == 4
        assert len(ends) == deaths, "it goes on without deaths"
        waits = sorted(stream.answered[id] - sent for id, sent in stream.sent.items())
        for name, share in (("p50_s", 0.5), ("p99_s", 0.99)):
            record_property(name, round(waits[int(len(waits) * share)], 3))


async def test_healthy_replicas_that_are_killed_again_and_again_dead_letter_nothing(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=PARTITIONS)
    two = [Replica(stack, topics, models / "a", tmp_path / f"log{n}", redis=False) for n in (0, 1)]
    chance = random.Random(7)
    async with (
        supervised(*two) as ends,
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
    ):
        stream = Stream(client, topics, results)
        async with streaming(stream):
            for kill in range(6):
                answered = len(stream.answered)

                async def more(answered: int = answered) -> bool:
                    await stream.look()
                    return len(stream.answered) > answered + 20

                await wait_until(more, within=90.0, what=f"answers after {kill} kills")
                chance.choice(two).kill()

                def ended(kill: int = kill) -> bool:
                    return len(ends) > kill

                await wait_until(ended, what="its end")
        await stream.all_answered()
        assert await letters.all() == []
        assert stream.errors == []
        assert len(ends) == 6


async def test_a_replica_that_is_stopped_in_order_leaves_no_suspects(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    first = Replica(stack, topics, models / "a", tmp_path / "first", redis=False)
    second = Replica(stack, topics, models / "a", tmp_path / "second", redis=False)
    async with producer(stack) as client, reader(stack, topics.results) as results:
        async with replicas(first):
            await client.send_and_wait(topics.jobs, b'{"input": "one"}', partition=0)
            await results.until(1)
            assert await first.stop() == 0
        async with replicas(second):
            await client.send_and_wait(topics.jobs, b'{"input": "two"}', partition=0)
            await results.until(2)
            assert (await second.metrics())["embedq_deaths_total"] == 0
            second.kill()
            await second.ended(patient(30))
        await client.send_and_wait(topics.jobs, b'{"input": "three"}', partition=0)
        async with replicas(first):
            await results.until(3)
            assert (await first.metrics())["embedq_deaths_total"] == 1
            assert await first.stop() == 0
