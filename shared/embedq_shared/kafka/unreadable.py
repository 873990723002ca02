"""Records that aiokafka cannot hand out are stepped over, and those around them are not lost."""

from __future__ import annotations

import asyncio
from typing import Final, TypeAlias

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CorruptRecordException, IllegalStateError, UnsupportedCodecError

UNREADABLE: Final = (UnicodeDecodeError, CorruptRecordException, UnsupportedCodecError)
"""What aiokafka raises for a record that it cannot hand out, poll after poll, until its reader steps over it.

The first is a header name that is not UTF-8, which any producer but aiokafka's can write.
"""

_POSITION_S: Final = 1.0
_REFETCH_MS: Final = 5_000
"""The longest wait for one record that the failed poll had fetched already: it is fetched again."""
_CAREFUL_RECORDS: Final = 2_000
"""Records read one by one after a poll that failed, before polls are whole again: each costs a call."""
_SEARCH_S: Final = 5.0
"""How long to look for the partition that made a poll fail; the next poll fails again and looks further."""
_SEARCH_PAUSE_S: Final = 0.02


class UnreadableRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that aiokafka cannot hand out, and that was stepped over: nothing is known but where it is."""

    topic: str
    partition: int
    offset: int
    reason: str
    """The type of aiokafka's error."""


Polled: TypeAlias = "ConsumerRecord | UnreadableRecord"


async def poll_partition(
    consumer: AIOKafkaConsumer, partition: TopicPartition, *, timeout_ms: int
) -> list[Polled]:
    """The next records of one partition, in order; waits `timeout_ms` for the first. One that cannot be read comes as an
    `UnreadableRecord`, and the consumer's position is after it.
    """
    try:
        polled = await consumer.getmany(partition, timeout_ms=timeout_ms)
    except UNREADABLE:
        # The failed poll withheld the good records before that one, and the position has not moved: read them again.
        return await _read_one_by_one(consumer, partition)
    found: list[Polled] = polled.get(partition, [])
    return found


async def poll(consumer: AIOKafkaConsumer, *, timeout_ms: int) -> list[Polled]:
    """The next records of one of the assigned partitions, in order; waits `timeout_ms` for the first.

    One that cannot be read comes as an `UnreadableRecord`. A poll of several partitions that fails loses what it had
    drained of the others, whose positions have moved. So only polls that cannot lose anything are made: of one record,
    and of one partition.
    """
    try:
        first = await consumer.getmany(timeout_ms=timeout_ms, max_records=1)
    except UNREADABLE:
        return await _find_unreadable(consumer)
    found: list[Polled] = []
    for partition, records in first.items():
        found += records
        found += await poll_partition(consumer, partition, timeout_ms=0)
    return found


async def _find_unreadable(consumer: AIOKafkaConsumer) -> list[Polled]:
    """The next records of all partitions, up to the one that made a poll fail: aiokafka does not say which partition it
    is in, and must fetch it again first.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + _SEARCH_S
    found: list[Polled] = []
    while True:
        for partition in sorted(consumer.assignment()):
            found += await poll_partition(consumer, partition, timeout_ms=0)
        if any(isinstance(record, UnreadableRecord) for record in found) or loop.time() > end:
            return found
        await asyncio.sleep(_SEARCH_PAUSE_S)


async def _read_one_by_one(consumer: AIOKafkaConsumer, partition: TopicPartition) -> list[Polled]:
    """The records up to the one that cannot be read, which is stepped over: what raises is at the position."""
    found: list[Polled] = []
    while len(found) < _CAREFUL_RECORDS:
        try:
            polled = await consumer.getmany(partition, timeout_ms=_REFETCH_MS, max_records=1)
        except UNREADABLE as error:
            offset = await step_over(consumer, partition)
            if offset is not None:
                found.append(
                    UnreadableRecord(
                        topic=partition.topic,
                        partition=partition.partition,
                        offset=offset,
                        reason=type(error).__name__,
                    )
                )
            break
        if not polled:
            break  # the broker is slow: if the record is still there, the next poll fails again
        found += polled[partition]
    return found


async def step_over(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """Move past the record at the position, for which a poll of one record raised one of `UNREADABLE`; its offset.

    None, and nothing moved, if the partition is not assigned any more. Where compaction left holes, the offset may be
    one before the record: then the next poll raises again.
    """
    offset = await position(consumer, partition)
    if offset is None:
        return None
    try:
        consumer.seek(partition, offset + 1)
    except IllegalStateError:
        return None
    return offset


async def position(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """The offset of the next record; None while the consumer has no position there."""
    try:
        async with asyncio.timeout(_POSITION_S):
            offset: int = await consumer.position(partition)
    except (TimeoutError, IllegalStateError):
        return None
    return offset
