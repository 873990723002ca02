"""The intake against a real broker, without the rest of the service."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import PartitionRecords

from embedq_consumer.flow import Flow
from embedq_consumer.intake import Intake
from embedq_consumer.jobs import Record
from embedq_consumer.metrics import Metrics
from embedq_sdk.dev import DevStack
from tests.promises import preload
from tests.replicas import fresh_prefix, make_topics
from tests.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


async def test_a_lane_that_is_full_again_and_again_fetches_its_records_once(
    stack: DevStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: Counter[TopicPartition] = Counter()
    parse = PartitionRecords.__init__

    def counting(self: PartitionRecords, tp: TopicPartition, records: object, *rest: object) -> None:
        fetched[tp] += 1
        parse(self, tp, records, *rest)

    monkeypatch.setattr(PartitionRecords, "__init__", counting)
    topics = await make_topics(stack, fresh_prefix(), partitions=2)
    await preload(stack, topics.jobs, 1000)
    flow = Flow(max_jobs=20, max_bytes=1_000_000)
    intake = Intake(
        {"bootstrap_servers": stack.kafka_servers},
        topics=topics,
        group=topics.prefix,
        flow=flow,
        metrics=Metrics(),
        beat=lambda: None,
        max_poll_records=10,
        session_timeout_ms=6000,
        rebalance_timeout_ms=20_000,
        commit_interval_s=0.5,
        max_uncommitted=2048,
    )
    seen: list[Record] = []
    was_full = 0

    def take(records: Sequence[Record]) -> None:
        nonlocal was_full
        seen.extend(records)
        was_full += flow.is_full("interactive")
        asyncio.get_running_loop().call_later(0.002, answer, list(records))

    def answer(records: Sequence[Record]) -> None:
        for record in records:
            intake.finish(record)

    await intake.open()
    polling = asyncio.create_task(intake.run(take, lambda record, error: None))
    try:
        await wait_until(lambda: len(seen) == 1000, what="every record")
        assert await intake.stop(within=10)
        await polling
    finally:
        polling.cancel()
        await intake.close()
    assert len({record.name for record in seen}) == 1000
    assert was_full > 10
    assert max(fetched.values()) <= 2  # the second for what the first response had no room for
