"""The one Kafka consumer: aiokafka's, with a ceiling on what a compressed batch may become."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher

from embedq_shared.access import DEFAULT_MAX_INFLATED_BYTES
from embedq_shared.kafka.clients import AIOKafkaConsumer
from embedq_shared.kafka.reading.record_batches import BoundedRecords

_ceiling: ContextVar[int | None] = ContextVar("embedq_kafka_ceiling", default=None)
"""Of the consumer whose fetching tasks run in this context; None in those of consumers that are not ours."""


class BoundedConsumer(AIOKafkaConsumer):
    """A consumer whose polls neither inflate a batch beyond `max_inflated_bytes` nor raise for what cannot be read: that
    comes in its place, as a record whose value is an `Unreadable`.

    aiokafka offers no place for it. Its fetcher makes a `MemoryRecords` of what the broker sent, by that name in its own
    module, in tasks that descend from `start`: so that name stands here for a choice by context, and other consumers of
    the process keep aiokafka's own. `tests/unit/shared/test_record_batches.py` fails if aiokafka goes another way.
    """

    def __init__(
        self, *topics: str, max_inflated_bytes: int = DEFAULT_MAX_INFLATED_BYTES, **options: Any
    ) -> None:
        super().__init__(*topics, **options)
        self._max_inflated_bytes = max_inflated_bytes

    async def start(self) -> None:
        """Connect."""
        before = _ceiling.set(self._max_inflated_bytes)
        try:
            await super().start()
        finally:
            _ceiling.reset(before)
        self._fetcher.__class__ = PromptFetcher


class PromptFetcher(fetcher.Fetcher):  # type: ignore[misc]  # aiokafka has no type information
    """Wakes whoever waits for records as soon as they are there.

    aiokafka leaves that to the routine that sends fetches, which is itself woken two rounds of the event loop later, finds
    the records not consumed yet, and has to be woken again to fetch the next ones.
    """

    async def _proc_fetch_request(self, *request: Any) -> bool:
        if await super()._proc_fetch_request(*request):
            for waiter in self._fetch_waiters:
                self._notify(waiter)
        return False  # nobody is left for the routine to wake

    async def fetched_records(
        self, partitions: Sequence[TopicPartition], timeout: float = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[ConsumerRecord]]:
        """What is there of these partitions; waits `timeout` seconds at most until there is something."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            found: dict[TopicPartition, list[ConsumerRecord]]
            found = await super().fetched_records(partitions, 0, max_records)
            if found or loop.time() >= end or self._closed:
                return found
            # aiokafka waits for a set of one, with a task and a round of the loop more.
            waiter = self._create_fetch_waiter()
            timer = loop.call_at(end, self._notify, waiter)
            try:
                await waiter
            finally:
                timer.cancel()


_unbounded_records = fetcher.MemoryRecords


def _records(data: bytes | None) -> Any:
    ceiling = _ceiling.get()
    return _unbounded_records(data) if ceiling is None else BoundedRecords(data, ceiling)


fetcher.MemoryRecords = _records
