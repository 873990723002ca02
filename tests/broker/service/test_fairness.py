"""One client's flood lies in Kafka, and another one's job behind it, in the same partition: who is answered when.

Answers are counted in their order on a results topic of one partition, and not in seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedq_consumer.fairness.traffic import LATELY_S
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]

WORDS = "the tide turns twice a day and nobody asks why"


async def send(stack: DevStack, topic: str, jobs: Iterable[dict[str, Any]], client: str) -> None:
    """Put one client's jobs into the only partition of a topic."""
    async with producer(stack) as out:
        headers = [("client-id", client.encode())]
        sent = [
            await out.send(topic, json.dumps(job, separators=(",", ":")).encode(), headers=headers)
            for job in jobs
        ]
        await asyncio.gather(*sent)


async def answers(stack: DevStack, topics: Topics, *ids: str) -> list[str]:
    """The ids of all answered jobs in the order of their first result, until these are among them."""
    async with reader(stack, topics.results) as results:
        order: dict[str, None] = {}
        seen = 0

        async def all_there() -> bool:
            nonlocal seen
            records = await results.all()
            for record in records[seen:]:
                order.setdefault(json.loads(record.value)["id"])
            seen = len(records)
            return set(ids) <= order.keys()

        await wait_until(all_there, within=240, what=f"answers to {ids}")
        return list(order)


async def order_of(
    stack: DevStack, model: Path, log: Path, flood: Sequence[dict[str, Any]], *others: dict[str, Any]
) -> tuple[list[str], dict[str, float]]:
    """The order of the answers up to those of the other clients' jobs, which come behind the flood; and the metrics then."""
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    await send(stack, topics.jobs, flood, "flood")
    for number, job in enumerate(others):
        await send(stack, topics.jobs, [job], f"other {number}")
    async with replicas(Replica(stack, topics, model, log)) as (replica,):
        order = await answers(stack, topics, *(job["id"] for job in others))
        return order, await replica.metrics()


def over_a_half(metrics: dict[str, float]) -> float:
    """How many micro-batches had more than half of a CPU's 1,024 tokens: a quarter of bulk ones, and the interactive ones."""
    return metrics["embedq_batch_tokens_count"] - metrics['embedq_batch_tokens_bucket{le="512.0"}']


async def test_behind_6000_jobs_of_one_client_another_ones_is_answered_among_the_first(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    flood = [
        {"id": f"flood-{number}", "input": f"{number} {WORDS}", "dimensions": 32} for number in range(6000)
    ]
    others = [
        {"id": f"other-{number}", "input": f"a short one {number}", "dimensions": 32} for number in range(3)
    ]
    order, _ = await order_of(stack, models / "a", tmp_path / "log", flood, *others)
    # Reading 6,000 records takes a few micro-batches of some hundred short texts each.
    assert max(order.index(str(job["id"])) for job in others) < 2500


async def test_behind_60_jobs_of_2048_equal_inputs_another_ones_job_is_answered_among_the_first(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    flood = [{"id": f"flood-{number}", "input": [str(number % 10)] * 2048} for number in range(60)]
    assert len(json.dumps(flood[0], separators=(",", ":"))) < 9000
    other: dict[str, Any] = {"id": "other", "input": "a short one"}
    order, metrics = await order_of(stack, models / "a", tmp_path / "log", flood, other)
    assert order.index("other") <= 5
    assert metrics["embedq_tokens_total"] < 60 * 2048  # equal inputs are computed once
    assert metrics['embedq_cache_lookups_total{outcome="miss"}'] <= 61


async def test_behind_a_book_of_its_own_client_a_short_text_is_answered_first(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    book = " ".join(f"{number} {WORDS}." for number in range(2000))
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    jobs = [
        {"id": "book", "input": book, "chunk": {"mode": "mean", "tokens": 256}, "dimensions": 32},
        {"id": "short", "input": "a short one", "dimensions": 32},
    ]
    await send(stack, topics.jobs, jobs, "reader")
    async with replicas(Replica(stack, topics, models / "a", tmp_path / "log")):
        assert await answers(stack, topics, "book", "short") == ["short", "book"]


async def test_an_interactive_job_does_not_wait_for_a_bulk_backlog(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    backlog = [
        {"id": f"bulk-{number}", "input": f"{number} {WORDS}", "dimensions": 32} for number in range(20_000)
    ]
    await send(stack, topics.bulk, backlog, "bulk")
    async with (
        replicas(Replica(stack, topics, models / "a", tmp_path / "log")) as (replica,),
        reader(stack, topics.results) as results,
    ):
        await results.until(200, within=240)
        last = (float("-inf"), 0.0)
        for number in range(5):
            before, began = len(await results.all()), time.monotonic()
            await send(stack, topics.jobs, [{"id": f"urgent-{number}", "input": f"urgent {number}"}], "other")
            order = await answers(stack, topics, f"urgent-{number}")
            # What micro-batches, and this test's own way to the broker and back, take.
            assert order.index(f"urgent-{number}") - before < 4000
            whole = over_a_half(await replica.metrics())
            if time.monotonic() - last[0] < LATELY_S:  # else bulk may have had the device for itself again
                assert whole == last[1], "beside interactive jobs bulk runs in quarters of a micro-batch"
            last = began, whole
        metrics = await replica.metrics()
        assert metrics['embedq_in_flight_jobs{lane="bulk"}'] <= 32_768


async def test_jobs_that_expired_in_the_queue_cost_no_computing(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    async with producer(stack) as out:
        for number in range(2000):
            job = {"id": f"late-{number}", "input": f"{number} {WORDS}"}
            await out.send(topics.jobs, json.dumps(job).encode(), headers=[("deadline", b"1")])
    await send(stack, topics.jobs, [{"id": "live", "input": "a short one"}], "other")
    async with replicas(Replica(stack, topics, models / "a", tmp_path / "log")) as (replica,):
        await answers(stack, topics, "live", "late-1999")

        async def all_counted() -> bool:
            """The brokers show an answer before the service, which waits for their word, counts it."""
            return (await replica.metrics())['embedq_errors_total{code="expired"}'] == 2000

        await wait_until(all_counted, within=60, what="2,000 jobs counted as expired")
        assert (await replica.metrics())["embedq_tokens_total"] < 20
