"""The consumer of jobs leaves records of retry topics for later, and nobody waits for them."""

from __future__ import annotations

import asyncio
import time

import pytest

from embedq_consumer.retries import RetryTiers, Tier, TierConsumer
from embedq_shared.kafka import TopicPartition
from embedq_shared.topics import Topics
from tests.helpers.scripted_consumer import Headers, ScriptedConsumer

TOPICS = Topics("t")
TIERS = RetryTiers(tiers=(Tier(number=1, topic=TOPICS.retry(1), delay_s=60.0),))
BULK, TIER = TopicPartition(TOPICS.bulk, 0), TopicPartition(TOPICS.retry(1), 0)
LATER: Headers = (("embedq-due", b"%d" % 10**15),)


class Parts:
    def __init__(self) -> None:
        self.inner = ScriptedConsumer()
        self.now = 0.0
        self.consumer = TierConsumer(self.inner, TIERS, clock=lambda: self.now, wall_clock=lambda: self.now)
        self.consumer.assign([BULK, TIER])

    async def poll(self, timeout_ms: int = 0, limit: int = 10) -> list[tuple[str, int]]:
        found = await self.consumer.getmany(BULK, TIER, timeout_ms=timeout_ms, max_records=limit)
        return [
            (partition.topic, record.offset) for partition, records in found.items() for record in records
        ]


async def test_a_partition_that_waits_is_left_out_of_the_polls_and_handed_out_in_its_time() -> None:
    parts = Parts()
    parts.inner.write(TIER, b"a", b"b", headers=LATER)
    parts.inner.write(BULK, b"c")
    assert await parts.poll() == [(TOPICS.bulk, 0)]
    assert await parts.consumer.position(TIER) == 0, "what was not handed out is read again by the next owner"
    assert parts.consumer.highwater(TIER) == 2
    parts.inner.write(BULK, b"d")
    assert await parts.poll() == [(TOPICS.bulk, 1)]
    assert list(parts.inner.latest) == [BULK]
    parts.now = 60.0
    assert await parts.poll() == [(TOPICS.retry(1), 0), (TOPICS.retry(1), 1)]
    assert await parts.consumer.position(TIER) == 2
    await parts.poll()
    assert list(parts.inner.latest) == [BULK, TIER]


async def test_no_more_come_than_were_asked_for() -> None:
    parts = Parts()
    parts.inner.write(TIER, b"a", b"b")
    parts.inner.write(BULK, b"c", b"d")
    assert await parts.poll(limit=3) == [(TOPICS.bulk, 0), (TOPICS.bulk, 1), (TOPICS.retry(1), 0)]
    assert await parts.poll(limit=3) == [(TOPICS.retry(1), 1)]


async def test_where_all_wait_the_poll_waits_no_longer_than_it_was_told() -> None:
    parts = Parts()
    parts.inner.write(TIER, b"a", headers=LATER)
    assert await parts.poll() == []
    before = len(parts.inner.polls)
    found = await parts.consumer.getmany(TIER, timeout_ms=5, max_records=1)
    assert (found, len(parts.inner.polls)) == ({}, before), "a poll of no partition asks the client for all"


async def test_a_poll_ends_when_the_first_record_is_due() -> None:
    inner = ScriptedConsumer(blocks=True)
    consumer = TierConsumer(inner, TIERS)
    consumer.assign([BULK, TIER])
    inner.write(TIER, b"a", headers=(("embedq-due", b"%d" % (time.time() * 1000 + 30)),))
    assert await consumer.getmany(TIER, timeout_ms=0, max_records=1) == {}
    found = await consumer.getmany(TIER, timeout_ms=60_000, max_records=1)
    while not found:
        found = await consumer.getmany(TIER, timeout_ms=60_000, max_records=1)
    assert [record.value for record in found[TIER]] == [b"a"]


async def test_what_waits_is_read_anew_where_the_positions_change() -> None:
    parts = Parts()
    parts.inner.write(TIER, b"a", b"b", headers=LATER)
    assert await parts.poll() == []
    parts.consumer.seek(TIER, 1)
    assert await parts.consumer.position(TIER) == 1
    assert await parts.poll() == []
    parts.consumer.assign([TIER])
    assert await parts.consumer.position(TIER) == 0
    parts.now = 60.0
    assert await parts.poll() == []
    parts.now = 120.0
    assert await parts.poll() == [(TOPICS.retry(1), 0), (TOPICS.retry(1), 1)]


async def test_a_poll_that_is_cancelled_has_moved_no_position() -> None:
    parts = Parts()
    parts.inner.blocks = True
    parts.inner.write(TIER, b"a", headers=LATER)
    assert await parts.poll() == []
    polling = asyncio.ensure_future(parts.poll(timeout_ms=1_000))
    await asyncio.sleep(0)
    parts.now = 60.0
    polling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await polling
    assert await parts.poll() == [(TOPICS.retry(1), 0)]


async def test_the_rest_is_the_consumers_own() -> None:
    parts = Parts()
    await parts.consumer.start()
    parts.inner.write(BULK, b"a")
    assert await parts.consumer.end_offsets([BULK]) == {BULK: 1}
    assert await parts.consumer.beginning_offsets([BULK]) == {BULK: 0}
    await parts.consumer.stop()
    assert parts.inner.calls == ["assign", "start", "stop"]
