"""What this replica says of itself on the status topic: at each change, and again as long as it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import encode_record, status_key
from embedq_shared.messages import STATUS_INTERVAL_S, Control, State, Status, Step
from embedq_shared.topics import Topics

Publish = Callable[[list[Outgoing]], Awaitable[object]]


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The model that serves, as a status says it."""

    dimensions: int
    max_tokens: int
    path: str | None
    """The directory, as a command would name it; None where none could."""
    memory_used: int | None
    memory_total: int | None
    splits: dict[str, dict[str, int]]
    """The weights of every split."""
    served_s: float = 0.0
    first_error_s: float | None = None


class StatusReporter:
    """Owns the status of a replica's alias. Key of each record: the replica, and for all but the `first` alias that alias too, so
    that compaction keeps the last one of each."""

    # More than six parameters: each is another part; one caller.
    def __init__(
        self,
        topics: Topics,
        replica: str,
        alias: str,
        publish: Publish,
        metrics: Metrics,
        serving: Callable[[], Serving | None] = lambda: None,
        first: bool = True,
    ) -> None:
        """`serving` is the model that serves, if one does."""
        self._key = status_key(replica, alias, first=first)
        self._topic = topics.status
        self._publish = publish
        self._metrics = metrics
        self._serving = serving
        self._step_since = time.monotonic()
        self.status = Status(
            replica=replica,
            alias=alias,
            version=None,
            step="starting",
            state="LOADING",
            model_version=None,
            error=None,
            at=0,
            pool=topics.pool,
        )

    async def update(
        self,
        step: Step,
        state: State,
        *,
        command: Control | None = None,
        model_version: str | None = None,
        error: str | None = None,
    ) -> None:
        """Change the status and publish it. What is not given of a command or a model stays as it was."""
        now = time.monotonic()
        if self.status.step != step:
            self._metrics.reload_step_seconds.labels(self.status.step).observe(now - self._step_since)
            self._step_since = now
        self.status = msgspec.structs.replace(
            self.status,
            step=step,
            state=state,
            error=error or _taken_back(command, state),
            version=command.version if command else self.status.version,
            command_id=command.command_id if command else self.status.command_id,
            turn=self._turn_after(command, step, state),
            warmed=None if step == "validate" else self.status.warmed,
            model_version=model_version or self.status.model_version,
        )
        await self._send(self.status)

    async def show_warmed(self, texts: int) -> None:
        """Say of how many texts, of those used most, the cache has a vector of the model that is on trial."""
        self.status = msgspec.structs.replace(self.status, warmed=texts)
        await self._send(self.status)

    async def take_turn(self, version: int | None) -> None:
        """Say that this replica takes its turn of a command, or (None) that it does not. A turn ends with READY or STOPPED, and where
        another command takes the place."""
        self.status = msgspec.structs.replace(self.status, turn=version)
        await self._send(self.status)

    async def reject(self, command: Control, error: str, step: Step = "validate") -> None:
        """Say once that a command was not applied, or given up, without changing the status, which should be sent again after it."""
        if command.version == self.status.turn:
            self.status = msgspec.structs.replace(self.status, turn=None)  # it is over, and nobody failed
        await self._send(
            msgspec.structs.replace(
                self.status,
                version=command.version,
                command_id=command.command_id,
                step=step,
                state="FAILED",
                error=error,
            )
        )

    def _turn_after(self, command: Control | None, step: Step, state: State) -> int | None:
        """The turn that a status leaves. A failure keeps it, and takes it where it came before the turn, so that the others go no
        further; one of a replica that starts is its own."""
        if state in ("READY", "STOPPED"):
            return None
        if command is not None and command.rollout is not None and state == "FAILED" and step != "serving":
            return command.version
        return self.status.turn if command is None or command.version == self.status.turn else None

    async def resend(self) -> None:
        """Publish the status as it is."""
        await self._send(self.status)

    async def resend_forever(self) -> None:
        """Publish the status again and again, which says that this replica lives."""
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            await self.resend()

    async def _send(self, status: Status) -> None:
        serving = None if status.state == "STOPPED" else self._serving()
        sent = msgspec.structs.replace(status, at=int(time.time() * 1000), serving=serving is not None)
        if serving is not None:
            sent = msgspec.structs.replace(sent, **msgspec.structs.asdict(serving))
        record = Outgoing(
            topic=self._topic,
            partition=None,
            key=self._key,
            value=encode_record(sent),
            headers=[],
        )
        await self._publish([record])


def _taken_back(command: Control | None, state: State) -> str | None:
    """What people should know of a command that was followed: it took another one back."""
    if command is None or command.rollback_of is None or state != "READY":
        return None
    return f"version {command.rollback_of} was taken back: {command.reason}"
