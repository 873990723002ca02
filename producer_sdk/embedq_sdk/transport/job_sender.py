"""The one task that sends: it owns the producer and the queue in front of it."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from embedq_sdk.errors import InvalidArgument, KafkaUnavailable
from embedq_sdk.transport.kafka import KafkaConnection, close
from embedq_sdk.transport.pending_jobs import PendingJob

_LEAST_SPREAD: Final = 16
_MOST_JOBS: Final = 4096
_RECONNECT_S: Final = 30.0
_SEND_S: Final = 10.0
_TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)


def share(waiting: int, partitions: int) -> int:
    """How many of the waiting jobs the next batch takes.

    Few enough that a burst reaches every partition, so that every replica gets some; enough to be worth a batch.
    """
    return max(_LEAST_SPREAD, -(-waiting // partitions))


class Sender:
    """Jobs in the order of `put`, in batches, to the partitions in turn.

    A partition gets a new batch when it has acknowledged the last one: what comes meanwhile makes the next batch larger.
    A job stays ours until Kafka acknowledges it, across broken producers; its own deadline ends it.
    """

    def __init__(self, servers: KafkaConnection) -> None:
        self._servers = servers
        self._queues: dict[str, deque[PendingJob]] = {}
        self._partitions: dict[str, int] = {}
        self._turn: dict[str, int] = {}
        self._busy: set[tuple[str, int]] = set()
        self._work = asyncio.Event()
        self._producer: AIOKafkaProducer | None = None
        self._broken = False
        self._most = _MOST_JOBS

    @property
    def broken(self) -> bool:
        """Whether the last that Kafka said to us was an error."""
        return self._broken

    def put(self, call: PendingJob) -> None:
        """Send a call's job soon. Never waits: admission is the caller's."""
        self._queues.setdefault(call.topic, deque()).append(call)
        self._work.set()

    async def open(self, timeout: float) -> None:
        """Connect.

        Raises:
            KafkaUnavailable: not within `timeout` seconds.
        """
        self._producer = await self._servers.start(self._servers.producer, timeout)

    async def close(self) -> None:
        """Let the producer go. What was not acknowledged may still arrive or not."""
        if self._producer is not None:
            await close(self._producer)
            self._producer = None

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            if self._broken and not self._busy:
                await self._replace()
            if self._broken:
                continue  # the batches still out decide when; each of them sets `_work`
            for topic, queue in self._queues.items():
                if queue:
                    await self._send_waiting(topic, queue)

    async def _send_waiting(self, topic: str, queue: deque[PendingJob]) -> None:
        """As many batches as there are idle partitions."""
        producer = self._producer
        assert producer is not None
        try:
            async with asyncio.timeout(_SEND_S):
                if topic not in self._partitions:
                    self._partitions[topic] = len(await producer.partitions_for(topic))
                    self._turn[topic] = 0
                count = self._partitions[topic]
                most = min(self._most, share(len(queue), count))
                for _ in range(count):
                    if not queue:
                        return
                    partition = self._turn[topic] = (self._turn[topic] + 1) % count
                    if (topic, partition) in self._busy:
                        continue
                    calls, batch = self._fill(producer, queue, most)
                    if not calls:
                        continue
                    self._busy.add((topic, partition))
                    try:
                        future = await producer.send_batch(batch, topic, partition=partition)
                    except BaseException:
                        self._busy.discard((topic, partition))
                        queue.extendleft(reversed(calls))
                        raise
                    future.add_done_callback(partial(self._landed, calls, topic, partition))
        except (KafkaError, OSError, TimeoutError):
            self._broken = True
            self._work.set()

    @staticmethod
    def _fill(
        producer: AIOKafkaProducer, queue: deque[PendingJob], most: int
    ) -> tuple[list[PendingJob], Any]:
        """A batch of the first jobs that still matter to someone."""
        batch = producer.create_batch()
        calls: list[PendingJob] = []
        while queue and len(calls) < most:
            call = queue[0]
            if call.future.done():
                queue.popleft()
                continue
            if batch.append(timestamp=None, key=None, value=call.value, headers=call.headers) is None:
                if calls:
                    break
                queue.popleft()  # not even alone
                call.fail(_too_large(call))
                batch = producer.create_batch()
                continue
            calls.append(queue.popleft())
        batch.close()
        return calls, batch

    def _landed(self, calls: list[PendingJob], topic: str, partition: int, sent: asyncio.Future[Any]) -> None:
        """Kafka answered for a batch."""
        self._busy.discard((topic, partition))
        self._work.set()
        error = None if sent.cancelled() else sent.exception()
        if error is None and not sent.cancelled():
            self._broken = False
            for call in calls:
                call.acknowledged = True
                if not call.awaits_reply and not call.future.done():
                    call.future.set_result([])
        elif isinstance(error, _TOO_LARGE) and len(calls) == 1:
            calls[0].fail(_too_large(calls[0]))
        else:
            if isinstance(error, _TOO_LARGE):
                self._most = max(1, len(calls) // 2)  # the broker takes less than its default
            else:
                self._broken = True
            self._queues[topic].extendleft(reversed(calls))

    async def _replace(self) -> None:
        """A new producer: an aiokafka producer does not recover from every error by itself."""
        if self._producer is not None:
            await close(self._producer)
            self._producer = None
        while self._producer is None:
            try:
                self._producer = await self._servers.start(self._servers.producer, _RECONNECT_S)
            except KafkaUnavailable:
                continue  # jobs end at their own deadlines meanwhile
        self._partitions.clear()
        self._broken = False
        self._work.set()


def _too_large(call: PendingJob) -> InvalidArgument:
    return InvalidArgument(
        argument="texts",
        expected="a job that the broker's max.message.bytes allows",
        got=f"{len(call.value):,} bytes",
    )
