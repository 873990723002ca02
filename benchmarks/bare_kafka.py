"""A record there and back with nothing of ours between: what two hops over Kafka cost before anybody works.

The other side is a process of its own that sends each record back as it is. Clients are aiokafka's, set as embedq sets them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

THERE: Final = TopicPartition("bare.there", 0)
BACK: Final = TopicPartition("bare.back", 0)
_POLL_MS: Final = 1000


class _Ends:
    """A producer for one partition, and a consumer of the other from its end on."""

    def __init__(self, servers: str, writes: TopicPartition, reads: TopicPartition) -> None:
        self._producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=servers, fetch_max_wait_ms=500)
        self._writes = writes
        self._reads = reads

    async def open(self) -> None:
        """Connect, and stand at the end."""
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([self._reads])
        await self._consumer.seek_to_end(self._reads)
        await self._consumer.position(self._reads)

    async def send(self, value: bytes) -> None:
        """Hand it to the producer."""
        await self._producer.send(self._writes.topic, value, partition=self._writes.partition)

    async def next(self) -> list[Any]:
        """The records that came."""
        while not (found := await self._consumer.getmany(timeout_ms=_POLL_MS)):
            pass
        return [record for records in found.values() for record in records]

    async def close(self) -> None:
        """Disconnect."""
        await self._producer.stop()
        await self._consumer.stop()


class RoundTrip:
    """Sends a record and waits until it is back."""

    def __init__(self, ends: _Ends) -> None:
        self._ends = ends

    async def milliseconds(self, value: bytes) -> float:
        """Of one more."""
        began = time.perf_counter()
        await self._ends.send(value)
        await self._ends.next()
        return (time.perf_counter() - began) * 1000


@asynccontextmanager
async def round_trip(servers: str) -> AsyncIterator[RoundTrip]:
    """Both topics, the other side, and ours."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(each.topic, 1, 1) for each in (THERE, BACK)])
    await admin.close()
    ends = _Ends(servers, THERE, BACK)
    await ends.open()
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.bare_kafka", servers), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        await other.stdout.readline()  # it stands at the end
        yield RoundTrip(ends)
    finally:
        other.terminate()
        await other.wait()
        await ends.close()


async def send_back(servers: str) -> None:
    """The other side: every record goes back, until the process is ended."""
    ends = _Ends(servers, BACK, THERE)
    await ends.open()
    print("ready", flush=True)
    while True:
        for record in await ends.next():
            await ends.send(record.value)


if __name__ == "__main__":
    asyncio.run(send_back(sys.argv[1]))
