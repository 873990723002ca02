"""The one task that sends: it owns the producer and the queue of jobs before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from embedq_sdk.errors import InvalidArgument, KafkaRefused, KafkaUnavailable
from embedq_sdk.transport.kafka import KafkaConnection, close
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_shared.kafka import TOO_LARGE, AIOKafkaProducer, KafkaError, is_permanent

_LEAST_SHARE: Final = 16
"""Jobs in a batch, if that many wait: fewer are not worth a request."""
_MOST_JOBS: Final = 4096
"""Jobs in a batch, until the broker says that it takes less."""
_RECONNECT_S: Final = 30.0
_SEND_S: Final = 10.0
_REFUSED_PAUSE_S: Final = 1.0
"""Between two tries where the broker says that they will not help."""


def share(waiting: int, partitions: int) -> int:
    """How many of the waiting jobs the next batch takes.

    Few enough that a burst reaches every partition, so that every replica gets some; enough to be worth a batch.
    """
    return max(_LEAST_SHARE, -(-waiting // partitions))


class Sender:
    """Sends jobs in the order of `put`, in batches, to the partitions in turn.

    Invariants:
        - A partition has at most one batch under way; what arrives meanwhile makes its next batch larger.
        - A job stays in a queue or a batch until Kafka acknowledges it, across broken producers, or until its caller
          stops waiting for it.
        - While `broken`, nothing is sent; a new producer takes over once every batch has come back.
    """

    def __init__(self, connection: KafkaConnection) -> None:
        self._connection = connection
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
        """Whether Kafka's last answer was an error."""
        return self._broken

    def put(self, job: PendingJob) -> None:
        """Send a job soon. Never waits: the caller limits how many are in flight."""
        self._queues.setdefault(job.topic, deque()).append(job)
        self._work.set()

    async def open(self, timeout: float) -> None:
        """Connect.

        Raises:
            KafkaUnavailable: not within `timeout` seconds.
        """
        self._producer = await self._connection.connect(self._connection.producer, timeout)

    async def close(self) -> None:
        """Close the producer. A job that was not acknowledged may still arrive or not."""
        if self._producer is not None:
            await close(self._producer)
            self._producer = None

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            if self._broken and not self._busy:
                await self._replace_producer()
            if self._broken:
                continue  # each batch that is still out sets `_work` when it comes back
            for topic, queue in self._queues.items():
                if queue:
                    await self._send_waiting(topic, queue)

    async def _send_waiting(self, topic: str, queue: deque[PendingJob]) -> None:
        """Send as many batches as there are idle partitions."""
        producer = self._producer
        if producer is None:
            raise RuntimeError("the sender runs without a producer. This is a bug.")
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
                    jobs, batch = self._fill(producer, queue, most)
                    if not jobs:
                        continue
                    self._busy.add((topic, partition))
                    try:
                        future = await producer.send_batch(batch, topic, partition=partition)
                    except BaseException:
                        self._busy.discard((topic, partition))
                        queue.extendleft(reversed(jobs))
                        raise
                    future.add_done_callback(partial(self._answered, jobs, topic, partition))
        except (KafkaError, OSError) as error:
            if is_permanent(error):
                self._refuse(self._connection.failed(error, "sending"), queue)
                queue.clear()
            self._broken = True
            self._work.set()
        except TimeoutError:
            self._broken = True
            self._work.set()

    @staticmethod
    def _fill(
        producer: AIOKafkaProducer, queue: deque[PendingJob], most: int
    ) -> tuple[list[PendingJob], Any]:
        """A batch of the first jobs that a caller still waits for."""
        batch = producer.create_batch()
        jobs: list[PendingJob] = []
        while queue and len(jobs) < most:
            job = queue[0]
            if job.future.done():
                queue.popleft()
                continue
            if batch.append(timestamp=None, key=None, value=job.value, headers=job.headers) is None:
                if jobs:
                    break
                queue.popleft()  # too large even for a batch of its own
                job.fail(_too_large(job))
                batch = producer.create_batch()
                continue
            jobs.append(queue.popleft())
        batch.close()
        return jobs, batch

    def _answered(
        self, jobs: list[PendingJob], topic: str, partition: int, sent: asyncio.Future[Any]
    ) -> None:
        """Kafka acknowledged or refused a batch."""
        self._busy.discard((topic, partition))
        self._work.set()
        error = None if sent.cancelled() else sent.exception()
        if error is None and not sent.cancelled():
            self._broken = False
            for job in jobs:
                job.acknowledged = True
                if not job.awaits_reply and not job.future.done():
                    job.future.set_result([])
        elif isinstance(error, TOO_LARGE) and len(jobs) == 1:
            jobs[0].fail(_too_large(jobs[0]))
        elif isinstance(error, KafkaError) and is_permanent(error):
            self._refuse(self._connection.failed(error, "sending"), jobs)
        else:
            if isinstance(error, TOO_LARGE):
                self._most = max(1, len(jobs) // 2)  # the broker takes less than its default
            else:
                self._broken = True
            self._queues[topic].extendleft(reversed(jobs))

    async def _replace_producer(self) -> None:
        """Connect a new producer: aiokafka's does not recover from every error by itself."""
        if self._producer is not None:
            await close(self._producer)
            self._producer = None
        while self._producer is None:
            try:
                self._producer = await self._connection.connect(self._connection.producer, _RECONNECT_S)
            except KafkaRefused as refused:
                for queue in self._queues.values():
                    self._refuse(refused, queue)
                    queue.clear()
                await asyncio.sleep(_REFUSED_PAUSE_S)
            except KafkaUnavailable:
                continue  # jobs end at their own deadlines meanwhile
        self._partitions.clear()
        self._broken = False
        self._work.set()

    @staticmethod
    def _refuse(error: KafkaUnavailable, jobs: Iterable[PendingJob]) -> None:
        """End jobs that Kafka will not take, now or later."""
        for job in jobs:
            job.fail(type(error)(**vars(error)))


def _too_large(job: PendingJob) -> InvalidArgument:
    return InvalidArgument(
        argument="texts",
        expected="a job that the broker's max.message.bytes allows",
        got=f"{len(job.value):,} bytes",
    )
