"""A fake service on a real Kafka, for the SDK's broker tests. As a program it answers until it is killed."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiokafka import TopicPartition

from embedq_shared.kafka import AIOKafkaConsumer, AIOKafkaProducer
from embedq_shared.topics import Topics
from tests.helpers.fake_service import Answer, FakeService, Received, reply_record


@dataclass
class Responder(FakeService):
    """Answers every job that arrives after it was entered."""

    servers: str
    prefix: str = "embed"

    async def __aenter__(self) -> Self:
        topics = Topics(self.prefix)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self.servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=100,
        )
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.servers, max_batch_size=1_000_000, max_request_size=1_100_000
        )
        await self._consumer.start()
        await self._producer.start()
        everything = [
            TopicPartition(lane, n)
            for lane in topics.lanes
            for n in await self._producer.partitions_for(lane)
        ]
        self._consumer.assign(everything)
        await self._consumer.seek_to_end(*everything)
        for tp in everything:
            await self._consumer.position(tp)
        self._topics = topics
        self._task = asyncio.create_task(self._run(), name="responder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await asyncio.gather(self._consumer.stop(), self._producer.stop())
        if not self._task.cancelled():
            self._task.result()

    async def _run(self) -> None:
        while True:
            fetched = await self._consumer.getmany(timeout_ms=500)
            batches: dict[tuple[str, int], Any] = {}
            for records in fetched.values():
                for record in records:
                    received = self.receive(
                        record.value, record.headers, record.topic, record.partition, record.offset
                    )
                    for answer in self.answers(received):
                        await self._reply(received, answer, batches)
            for (topic, partition), batch in batches.items():
                await self._producer.send_batch(batch, topic, partition=partition)

    async def send(self, received: Received, answer: Answer) -> None:
        """One more answer, at a time of the test's choosing."""
        batches: dict[tuple[str, int], Any] = {}
        await self._reply(received, answer, batches)
        for (topic, partition), batch in batches.items():
            await (await self._producer.send_batch(batch, topic, partition=partition))

    async def _reply(self, received: Received, answer: Answer, batches: dict[tuple[str, int], Any]) -> None:
        topic = received.headers.reply_topic or self._topics.results
        partition = received.headers.reply_partition
        if partition is None:
            partition = hash(received.id) % len(await self._producer.partitions_for(topic))
        while partition not in await self._producer.partitions_for(topic):
            await self._producer.client.force_metadata_update()  # another topic of that name than we knew
        value, headers = reply_record(received, answer)
        key = (topic, partition)
        batch = batches.setdefault(key, self._producer.create_batch())
        if batch.append(timestamp=None, key=received.id.encode(), value=value, headers=headers) is None:
            await self._producer.send_batch(batch, topic, partition=partition)
            batches[key] = self._producer.create_batch()
            batches[key].append(timestamp=None, key=received.id.encode(), value=value, headers=headers)


async def _serve(servers: str) -> None:
    async with Responder(servers, keep=False, compute=False):
        print("ready", flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
