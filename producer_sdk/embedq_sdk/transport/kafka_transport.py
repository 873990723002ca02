"""A client's connection to Kafka: one sender, one reply reader, and the two tasks that run them."""

from __future__ import annotations

import asyncio
import time
import uuid
import zlib
from collections.abc import Callable
from typing import Any, Final

from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.job_sender import Sender
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_sdk.transport.reply_reader import ReplyReader
from embedq_sdk.transport.routing import ControlReader, Router
from embedq_shared.topics import Topics

_SILENT_S: Final = 1.2
"""A broker answers our fetch every half second: if it has not for this long, it is gone. Of a time in which our event loop stood
still, half a second counts at most, so that what the broker said meanwhile is heard first."""
_LEAST_CONNECT_S: Final = 0.1
"""The sender gets at least this long, even if the reply reader took all the time there was."""


class KafkaTransport:
    """Sends jobs and delivers the records of one reply partition; a `JobTransport`. Four tasks, each with a name.

    Args:
        connection: where Kafka is.
        topics: the topics of the service.
        instance: a stable name of this process, which chooses its reply partition; random if None.
        deliver: called with each record of the reply partition.
        broken: called with the error if one of the tasks ends by itself, which is our bug.
        refused: called with the error when Kafka refuses to let us read the replies, or has no reply topic any more; reading is
            tried again.
        moved: called when the reply topic was deleted and made again, once `reply_partition` is that of the new one.
    """

    # More than six parameters: what is told to its one owner is four functions.
    def __init__(
        self,
        connection: KafkaConnection,
        topics: Topics,
        instance: str | None,
        deliver: Callable[[Any], None],
        broken: Callable[[BaseException], None],
        refused: Callable[[KafkaRefused | TopicMissing], None],
        moved: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._topics = topics
        self._instance = (instance or uuid.uuid4().hex).encode()
        self._sender = Sender(connection)
        self._replies = ReplyReader(connection, topics.replies, self._partition_of, deliver, refused, moved)
        self.router = Router(
            topics, connection.servers, ControlReader(connection, topics, self._replies.topics)
        )
        """Where jobs go."""
        self._broken = broken
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, timeout: float) -> None:
        """Connect and start the tasks.

        Raises:
            KafkaUnavailable, TopicMissing.
        """
        end = time.monotonic() + timeout
        names = await self._replies.open([*self._topics.lanes, self._topics.replies], timeout)
        self.router.see_topics(names)
        try:
            await self._sender.open(max(_LEAST_CONNECT_S, end - time.monotonic()))
        except BaseException:
            await self._replies.close()
            raise
        for name, work in (
            ("embedq-reply-reader", self._replies.run()),
            ("embedq-job-sender", self._sender.run()),
            ("embedq-reply-topic", self._replies.watch()),
            ("embedq-control-reader", self.router.run()),
        ):
            task = asyncio.create_task(work, name=name)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    async def close(self) -> None:
        """Stop the tasks and disconnect. Takes a few seconds at most, whatever Kafka does."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks.clear()
            await asyncio.gather(self._sender.close(), self._replies.close())

    @property
    def reply_partition(self) -> int:
        """The partition of the reply topic that this client reads."""
        return self._replies.partition

    @property
    def silent(self) -> bool:
        """Whether the broker has stopped answering."""
        return self._sender.broken or self._replies.silent_for(time.monotonic()) > _SILENT_S

    def send(self, job: PendingJob) -> None:
        """Queue a job for the sender."""
        self._sender.put(job)

    def unavailable(self, reason: str) -> KafkaUnavailable:
        """The error that names the servers."""
        return self._connection.unavailable(reason)

    def _partition_of(self, partitions: int) -> int:
        return zlib.crc32(self._instance) % partitions

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._broken(task.exception() or RuntimeError(f"{task.get_name()} ended. This is a bug."))
