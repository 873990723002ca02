"""Replicas for control-plane tests: programs of status records, written to a real status topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from embedq_shared.codec import decode_control, encode_record
from embedq_shared.messages import Control, Status
from embedq_shared.topics import Topics

Steps = Callable[[Control], list[dict[str, Any]]]


def ready(command: Control) -> list[dict[str, Any]]:
    """A replica that follows every command."""
    return [
        {"step": "load", "state": "LOADING", "version": command.version, "command_id": command.command_id},
        {
            "step": "serving",
            "state": "READY",
            "version": command.version,
            "command_id": command.command_id,
            "model_version": "sha256:" + "c" * 64,
        },
    ]


def failing(command: Control) -> list[dict[str, Any]]:
    """A replica that cannot load the model."""
    return [
        {
            "step": "load",
            "state": "FAILED",
            "version": command.version,
            "command_id": command.command_id,
            "error": "no such directory",
        }
    ]


def failing_in_turn(command: Control) -> list[dict[str, Any]]:
    """A replica that fails in its turn, and follows the rollback."""
    if command.rollback_of is not None:
        return ready(command)
    return [status | {"turn": command.version} for status in failing(command)]


def silent(command: Control) -> list[dict[str, Any]]:
    """A replica that is stuck."""
    return []


@dataclass
class Replica:
    """Reports that it is there, and answers each command as its program says."""

    servers: str
    prefix: str
    name: str = "r1"
    steps: Steps = ready
    commands: list[Control] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        topics = Topics(self.prefix)
        self._status = topics.status
        self._control = TopicPartition(topics.control, 0)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=self.servers, fetch_max_wait_ms=100)
        self._producer = AIOKafkaProducer(bootstrap_servers=self.servers)
        await asyncio.gather(self._consumer.start(), self._producer.start())
        self._consumer.assign([self._control])
        await self._consumer.seek_to_end(self._control)
        await self._consumer.position(self._control)
        await self.say(step="serving", state="READY", version=None)
        self._task = asyncio.create_task(self._follow(), name=self.name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.say(step="stopped", state="STOPPED", version=None)
        await asyncio.gather(self._consumer.stop(), self._producer.stop())

    async def say(self, **changes: Any) -> None:
        """One status record."""
        known: dict[str, Any] = {
            "replica": self.name,
            "alias": "default",
            "version": None,
            "model_version": None,
            "error": None,
            "at": int(time.time() * 1000),
        }
        record = encode_record(Status(**(known | changes)))
        await self._producer.send_and_wait(self._status, record, key=self.name.encode(), partition=0)

    async def _follow(self) -> None:
        async for record in self._consumer:
            command = decode_control(record.value)
            self.commands.append(command)
            for step in self.steps(command):
                await self.say(**step)
