"""A client's transport without a broker: jobs go straight to a fake service, replies straight back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embedq_sdk.errors import KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.pending_jobs import PendingJob
from embedq_sdk.transport.routing import Router
from embedq_shared.headers import Header
from embedq_shared.topics import Topics
from tests.helpers.fake_service import Answer, FakeService, Received, reply_record


@dataclass(frozen=True)
class Record:
    """What a `ReplyRecord` is."""

    value: bytes | None
    headers: list[Header]
    offset: int = 0


class FakeTransport:
    """A `JobTransport`. It acknowledges every job and answers it in the event loop's next turn, unless told otherwise."""

    def __init__(
        self,
        connection: KafkaConnection | None = None,
        topics: Topics | None = None,
        instance: str | None = None,
        deliver: Callable[[Record], None] | None = None,
        broken: Callable[[BaseException], None] | None = None,
        refused: Callable[[KafkaRefused | TopicMissing], None] | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        self.service = FakeService()
        self.router = Router(topics or Topics("t"))
        self.sent: list[PendingJob] = []
        self.acknowledges = True
        self.silent = False
        self.reply_partition = 3
        self.closed = False
        self.deliver = deliver
        self.broken = broken
        self.refused = refused
        self.moved = moved
        self.fails_to_open: Exception | None = None
        self.opened = 0
        self.may_open = asyncio.Event()
        self.may_open.set()

    async def open(self, timeout: float) -> None:
        self.opened += 1
        await self.may_open.wait()
        if self.fails_to_open is not None:
            raise self.fails_to_open

    async def close(self) -> None:
        self.closed = True

    def unavailable(self, reason: str) -> KafkaUnavailable:
        return KafkaUnavailable(servers="fake:9092", reason=reason)

    def send(self, job: PendingJob) -> None:
        if job.future.done():
            return
        self.sent.append(job)
        received = self.service.receive(job.value, job.headers, job.topic, 0, len(self.sent))
        if not self.acknowledges:
            return
        job.acknowledged = True
        loop = asyncio.get_running_loop()
        if not job.awaits_reply:
            loop.call_soon(job.complete, [])
            return
        for answer in self.service.answers(received):
            loop.call_soon(self.reply, received, answer)

    def reply(self, received: Received, answer: Answer, **changes: Any) -> None:
        """Deliver an answer, perhaps with another value, headers or offset."""
        assert self.deliver is not None
        value, headers = reply_record(received, answer)
        self.deliver(Record(**({"value": value, "headers": headers} | changes)))
