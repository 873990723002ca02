"""Records that aiokafka cannot hand out to a reader, written as no method of aiokafka's writes them."""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c

from tests.helpers.support import wait_until

_CHECKSUM_AT: Final = 17
"""In a record batch of format 2; it covers all that follows."""
_NAME: Final = b"header-name"


@asynccontextmanager
async def plain_producer(servers: str) -> AsyncIterator[AIOKafkaProducer]:
    """A producer as a program without the SDK has one."""
    client = AIOKafkaProducer(bootstrap_servers=servers)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def send_unreadable(client: AIOKafkaProducer, topic: str, partition: int = 0, **record: Any) -> int:
    """Write a record with a header name that is not UTF-8; its offset.

    The batch is made as the client makes it, with a name of as many bytes; then the name is changed, and the checksum.
    """
    batch = client.create_batch()
    batch.append(
        timestamp=int(time.time() * 1000),
        key=record.get("key"),
        value=record.get("value", b"{}"),
        headers=[(_NAME.decode(), b"x")],
    )
    batch.close()
    data = bytearray(batch._build())
    at = data.index(_NAME)
    data[at : at + 2] = b"\xff\xfe"
    struct.pack_into(">I", data, _CHECKSUM_AT, calc_crc32c(bytes(data[_CHECKSUM_AT + 4 :])))
    request = ProduceRequest(
        transactional_id=None, required_acks=-1, timeout=5000, topics=[(topic, [(partition, bytes(data))])]
    )
    offset = -1

    async def written() -> bool:
        """A topic that was made just now has no leader yet, or another than the client knows."""
        nonlocal offset
        await client.client.force_metadata_update()
        await client.partitions_for(topic)
        leader = client.client.cluster.leader_for_partition(TopicPartition(topic, partition))
        response = await client.client.send(leader, request)
        [(_, [(_, code, offset, *_)])] = response.topics
        if code and not for_code(code).retriable:
            raise for_code(code)(topic)
        return bool(code == 0)

    await wait_until(written, what="the unreadable record")
    return offset
