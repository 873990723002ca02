"""The one task that reads replies, from one partition of the reply topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from embedq_sdk.errors import KafkaUnavailable
from embedq_sdk.transport.kafka import KafkaConnection, close, require_topics

_FETCH_WAIT_MS: Final = 500
_RECONNECT_S: Final = 30.0
_FIRST_STEP_S: Final = 10.0


class ReplyReader:
    """Every record of one reply partition that came after `open`, in order.

    No consumer group: a rebalance would take the partition away while replies are under way. The position is fixed at
    the partition's end before the first job is sent, so no reply can slip in front of it.
    """

    def __init__(
        self,
        servers: KafkaConnection,
        topic: str,
        choose: Callable[[int], int],
        deliver: Callable[[Any], None],
    ) -> None:
        self._servers = servers
        self._topic = topic
        self._choose = choose
        self._deliver = deliver
        self._consumer: AIOKafkaConsumer | None = None
        self._position: int | None = None
        self.partition = -1

    def silent_for(self, now: float) -> float:
        """Seconds since the broker last answered a fetch; it answers every half second, with or without replies."""
        if self._consumer is None:
            return float("inf")
        last = self._consumer.last_poll_timestamp(TopicPartition(self._topic, self.partition))
        return float("inf") if last is None else now - last / 1000

    async def open(self, topics: list[str], timeout: float) -> None:
        """Connect, check that `topics` are there, choose the partition and go to its end.

        Raises:
            KafkaUnavailable, TopicMissing.
        """
        end = time.monotonic() + timeout
        consumer = await self._start(timeout)
        try:
            left = max(0.1, end - time.monotonic())
            await require_topics(self._servers, consumer, topics, left)
            self._consumer = consumer
            await self._servers.within(
                left, "finding the end of the reply partition", self._go_to_end(consumer)
            )
        except BaseException:
            self._consumer = None
            await close(consumer)
            raise

    async def _go_to_end(self, consumer: AIOKafkaConsumer) -> None:
        # Assigning a partition makes the client ask for the topic's metadata; the counts come with it.
        self.partition = 0
        partitions = consumer.partitions_for_topic(self._topic)
        if partitions is None:
            consumer.assign([TopicPartition(self._topic, 0)])
            await consumer.position(TopicPartition(self._topic, 0))
            partitions = consumer.partitions_for_topic(self._topic) or {0}
        self.partition = self._choose(len(partitions))
        here = TopicPartition(self._topic, self.partition)
        consumer.assign([here])
        await consumer.seek_to_end(here)
        self._position = await consumer.position(here)

    async def _start(self, timeout: float) -> AIOKafkaConsumer:
        return await self._servers.start(
            lambda: self._servers.consumer(fetch_max_wait_ms=_FETCH_WAIT_MS, fetch_max_bytes=32 << 20),
            timeout,
        )

    async def close(self) -> None:
        """Let the consumer go."""
        if self._consumer is not None:
            await close(self._consumer)
            self._consumer = None

    async def run(self) -> None:
        """Deliver records until cancelled."""
        while True:
            if self._consumer is None:
                await self._reconnect()
            assert self._consumer is not None
            try:
                await self._read(self._consumer)
            except (KafkaError, OSError):
                await self.close()

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        here = TopicPartition(self._topic, self.partition)
        while True:
            try:
                fetched = await consumer.getmany(here, timeout_ms=1000)
            except UnicodeDecodeError:
                await self._step_over(consumer, here)
                continue
            for record in fetched.get(here, ()):
                self._position = record.offset + 1
                self._deliver(record)

    async def _step_over(self, consumer: AIOKafkaConsumer, here: TopicPartition) -> None:
        """Pass a foreign record that aiokafka can't read, such as one with a header name that is not UTF-8.

        One record at a time, since a whole fetch would lose the good ones in front of it.
        """
        while True:
            try:
                async with asyncio.timeout(_FIRST_STEP_S):
                    record = await consumer.getone(here)
            except UnicodeDecodeError:
                consumer.seek(here, await consumer.position(here) + 1)
                return
            except TimeoutError:
                return
            self._position = record.offset + 1
            self._deliver(record)

    async def _reconnect(self) -> None:
        """A new consumer where the last one was."""
        while self._consumer is None:
            try:
                consumer = await self._start(_RECONNECT_S)
            except KafkaUnavailable:
                continue
            here = TopicPartition(self._topic, self.partition)
            consumer.assign([here])
            if self._position is not None:
                consumer.seek(here, self._position)
            self._consumer = consumer
