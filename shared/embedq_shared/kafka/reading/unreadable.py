"""Polls in which what cannot be read is a value among the others."""

from __future__ import annotations

import asyncio
from typing import Final, TypeAlias

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError

from embedq_shared.kafka.reading.record_batches import Unreadable

_POSITION_S: Final = 1.0
_POLL_RECORDS: Final = 1_000
"""Records of one poll: a batch within its ceiling may hold nine million empty ones, which as objects take gigabytes."""


class UnreadableRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What aiokafka cannot hand out, and was stepped over: nothing is known but where it is."""

    topic: str
    partition: int
    first_offset: int
    offset: int
    """The last one, where all of a batch cannot be read; else the only one."""
    reason: str


Polled: TypeAlias = "ConsumerRecord | UnreadableRecord"


async def poll_partition(
    consumer: AIOKafkaConsumer, partition: TopicPartition, *, timeout_ms: int
) -> list[Polled]:
    """The next records of one partition, in order; waits `timeout_ms` for the first. What cannot be read comes as an
    `UnreadableRecord`.
    """
    polled = await consumer.getmany(partition, timeout_ms=timeout_ms, max_records=_POLL_RECORDS)
    return [_read(record) for record in polled.get(partition, [])]


async def poll(consumer: AIOKafkaConsumer, *, timeout_ms: int) -> list[Polled]:
    """The next records of the assigned partitions, those of each in order; waits `timeout_ms` for the first. What cannot
    be read comes as an `UnreadableRecord`.
    """
    polled = await consumer.getmany(timeout_ms=timeout_ms, max_records=_POLL_RECORDS)
    return [_read(record) for records in polled.values() for record in records]


def _read(record: ConsumerRecord) -> Polled:
    if not isinstance(record.value, Unreadable):
        return record
    return UnreadableRecord(
        topic=record.topic,
        partition=record.partition,
        first_offset=record.value.first_offset,
        offset=record.offset,
        reason=record.value.reason,
    )


async def position(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """The offset of the next record; None while the consumer has no position there."""
    try:
        async with asyncio.timeout(_POSITION_S):
            offset: int = await consumer.position(partition)
    except (TimeoutError, IllegalStateError):
        return None
    return offset
