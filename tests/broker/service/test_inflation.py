"""Compressed batches of a few kilobytes that hold gigabytes: they cost a dead letter each, and no memory."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import psutil
import pytest
from aiokafka import ConsumerRecord

from embedq_sdk.dev import DevStack
from tests.helpers.neighbors import assert_served, neighbors
from tests.helpers.record_batches import CODECS, ZSTD, bomb, send_batch
from tests.helpers.service_process import (
    Replica,
    fresh_prefix,
    make_topics,
    producer,
    reader,
    replicas,
)

pytestmark = pytest.mark.kafka

MEGABYTE: Final = 1 << 20
SIZES: Final[Mapping[str, int]] = {"gzip": 400, "snappy": 18, "lz4": 200, "zstd": 400}
"""Megabytes that a batch of each codec inflates to. Snappy shrinks to a twentieth at best, and a broker takes 1 MB."""


def job(id: str) -> bytes:
    return json.dumps({"id": id, "input": f"the text of {id}", "dimensions": 32}).encode()


def place(letter: ConsumerRecord) -> tuple[str, int, int]:
    headers = dict(letter.headers)
    [partition] = struct.unpack(">i", headers["kafka_dlt-original-partition"])
    [offset] = struct.unpack(">q", headers["kafka_dlt-original-offset"])
    return headers["kafka_dlt-original-topic"].decode(), partition, offset


async def test_a_batch_of_38_kb_that_inflates_to_a_gigabyte_stops_nobody(
    stack: DevStack, models: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """With the default ceiling, while others' jobs come on the same partition and on the other ones."""
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False)
    data = await asyncio.to_thread(bomb, ZSTD, 1200 * MEGABYTE, count=10)
    assert len(data) < 60_000
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
    ):
        for n in range(40):
            await client.send_and_wait(topics.jobs, job(f"before {n}"), partition=n % 4)
        await results.until(40)
        process = psutil.Process(replica.pid)
        before = process.memory_info().rss
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, process.memory_info().rss)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        async with neighbors(stack, topics) as others:
            await others.progress(20)
            begun = time.monotonic()
            bad = set()
            for _ in range(3):
                bad.add((topics.jobs, 1, await send_batch(client, topics.jobs, 1, data) + 9))
                await others.progress(30)
            dead = await letters.until(len(bad))
            await others.progress(20)
        watching.cancel()

        found = await results.all()
        assert replica.returncode is None
        assert await replica.stop() == 0

    answers = [json.loads(record.value) for record in found]
    assert set(Counter(answer["id"] for answer in answers).values()) == {1}
    assert {f"before {n}" for n in range(40)} < {answer["id"] for answer in answers if "data" in answer}
    assert_served(others, begun, record_property)
    assert {place(letter) for letter in dead} == bad
    for letter in dead:
        reason = dict(letter.headers)["kafka_dlt-exception-message"].decode()
        assert "10 records" in reason
        assert "more than 67,108,864" in reason
        assert letter.value is None
    # The ceiling, the window of the decoder (at most as much as was written), and what the jobs take.
    assert peak - before < 250 * MEGABYTE


async def test_every_codec_has_the_ceiling_and_the_records_around_are_answered(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    """There before the replica starts, on one partition in a row, and behind one another on the others."""
    topics = await make_topics(stack, fresh_prefix(), partitions=2)
    replica = Replica(
        stack, topics, models / "a", tmp_path / "log", redis=False, max_inflated_bytes=16 * MEGABYTE
    )
    good: list[str] = []
    bad: set[tuple[str, int, int]] = set()
    async with producer(stack) as client:
        for number, (name, codec) in enumerate(CODECS.items()):
            data = await asyncio.to_thread(bomb, codec, SIZES[name] * MEGABYTE, count=number + 1)
            for topic in topics.lanes:
                for partition in range(2):
                    offset = await send_batch(client, topic, partition, data)
                    bad.add((topic, partition, offset + number))
                    if partition:
                        good.append(f"{topic} after {name}")
                        await client.send_and_wait(topic, job(good[-1]), partition=partition)
    async with (
        replicas(replica),
        reader(stack, topics.results) as results,
        reader(stack, topics.dead_letters) as letters,
    ):
        found = await results.until(len(good) + len(bad))
        dead = await letters.until(len(bad))
        assert await replica.stop() == 0

    answered = [json.loads(record.value) for record in found]
    assert sorted(each["id"] for each in answered if "data" in each) == sorted(good)
    assert {place(letter) for letter in dead} == bad
    reasons = Counter(
        next(
            name
            for name in CODECS
            if f"({name}, " in dict(letter.headers)["kafka_dlt-exception-message"].decode()
        )
        for letter in dead
    )
    assert reasons == dict.fromkeys(CODECS, 4)
