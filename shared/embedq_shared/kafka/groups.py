"""What a group has committed, how far it lags, and deleting what is not needed any more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)

_COORDINATOR_PAUSE_S: Final = 0.1

_NO_COORDINATOR: Final = (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
"""What a broker says about a group while it elects or loads the group's coordinator: it will know soon."""


async def committed_offsets(
    admin: AIOKafkaAdminClient, group: str, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, int]:
    """A group's committed offset for each of `partitions`, -1 where it never committed.

    Waits without end while the brokers have no coordinator for the group, as a new cluster has none until it is first
    asked: the deadline is the caller's.

    Raises:
        KafkaError: what else the brokers say.
    """
    wanted = list(partitions)
    while True:
        try:
            found = await admin.list_consumer_group_offsets(group, partitions=wanted)
        except _NO_COORDINATOR:
            found = {}
        # aiokafka does not look at the answer's own error code, with which no partition comes.
        if len(found) == len(wanted):
            return {partition: committed.offset for partition, committed in found.items()}
        await asyncio.sleep(_COORDINATOR_PAUSE_S)


async def group_lag(
    admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer, group: str, topics: Iterable[str]
) -> Mapping[str, int]:
    """How many records of each topic a group has not committed. Where it never committed, all that are there count, and where
    it committed an offset that is not there: that is of a topic which was deleted and made again.

    Waits like `committed_offsets`; any `consumer` will do, it only asks for offsets.

    Raises:
        KafkaError: what the brokers say.
    """
    names = list(topics)
    partitions = [
        TopicPartition(described["topic"], one["partition"])
        for described in await admin.describe_topics(names)
        for one in described["partitions"]
    ]
    committed = await committed_offsets(admin, group, partitions)
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    lag = dict.fromkeys(names, 0)
    for partition in partitions:
        end, done = ends[partition], committed[partition]
        lag[partition.topic] += end - (begins[partition] if done > end else max(done, begins[partition]))
    return lag


async def delete_before(admin: AIOKafkaAdminClient, offsets: Mapping[TopicPartition, int]) -> None:
    """Delete the records below these offsets. Kafka can only delete from a partition's beginning.

    Raises:
        KafkaError: what the brokers say, such as `PolicyViolationError` for a compacted topic.
    """
    if offsets:
        await admin.delete_records(
            {partition: RecordsToDelete(before_offset=offset) for partition, offset in offsets.items()}
        )
