"""The intake against a real broker, without the rest of the service."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import PartitionRecords

from embedq_consumer.intake.jobs_consumer import IntakeOptions, make_jobs_clients
from embedq_consumer.intake.poll_loop import Intake
from embedq_consumer.intake.records import Record
from embedq_consumer.telemetry.metrics import Metrics
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.delivery import preload
from tests.helpers.service_process import fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


class Taken:
    """What an intake with low limits took, in order. Each poll's records are answered a little later."""

    def __init__(self, stack: DevStack, topics: Topics) -> None:
        self.records: list[Record] = []
        self.times_full = 0
        options = IntakeOptions(
            group=topics.prefix,
            replica="r",
            static_membership=False,
            max_in_flight_jobs=20,
            max_in_flight_bytes=1_000_000,
            read_ahead_s=60.0,
            max_started_texts=1000,
            max_pending_bytes=1_000_000,
            max_poll_records=10,
            max_uncommitted=2048,
            commit_interval_s=0.5,
            session_timeout_ms=int(patient(6_000)),
            rebalance_timeout_ms=int(patient(20_000)),
            stuck_after_s=60.0,
            stuck_limit_s=600.0,
        )
        self._intake = Intake(
            make_jobs_clients({"bootstrap_servers": stack.kafka_servers}, options),
            options,
            topics=topics,
            metrics=Metrics(),
            beat=lambda: None,
        )

    async def until(self, count: int) -> None:
        """Run the intake until it took `count` records."""
        await self._intake.open()
        polling = asyncio.create_task(self._intake.run(self._take, lambda record, why: None))
        committing = asyncio.create_task(self._intake.commit_forever())
        try:
            await wait_until(lambda: len(self.records) >= count, what=f"{count} records")
            assert await self._intake.stop(within=patient(10))
            await polling
        finally:
            for task in (polling, committing):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await self._intake.close()

    def _take(self, started: Iterable[Record]) -> None:
        records = list(started)
        self.records += records
        self.times_full += self._intake.is_full("interactive")
        asyncio.get_running_loop().call_later(0.002, self._answer, records)

    def _answer(self, records: Sequence[Record]) -> None:
        for record in records:
            self._intake.finish(record)


async def test_a_lane_that_is_full_again_and_again_fetches_its_records_once(
    stack: DevStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: Counter[TopicPartition] = Counter()
    parse = PartitionRecords.__init__

    def counting(self: PartitionRecords, tp: TopicPartition, *rest: object) -> None:
        fetched[tp] += 1
        parse(self, tp, *rest)

    monkeypatch.setattr(PartitionRecords, "__init__", counting)
    topics = await make_topics(stack, fresh_prefix(), partitions=2)
    await preload(stack, topics.jobs, 1000)
    taken = Taken(stack, topics)
    await taken.until(1000)
    assert len({record.name for record in taken.records}) == 1000
    assert taken.times_full > 10
    assert max(fetched.values()) <= 2  # the second for what the first response had no room for


async def test_no_record_waits_until_all_that_was_fetched_of_another_partition_is_read(
    stack: DevStack,
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=2)
    await preload(stack, topics.jobs, 3000)
    taken = Taken(stack, topics)
    await taken.until(3000)
    partitions = [record.ticket.partition.partition for record in taken.records]
    later = max(partitions.index(0), partitions.index(1))  # a fetch may bring records of one alone
    both = Counter(partitions[later : later + 100])
    assert min(both[0], both[1]) >= 30
