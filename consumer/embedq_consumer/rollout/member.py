"""One replica of a fleet that changes its model: the loop around `Turns`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

import structlog

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.lifecycle import ModelRejected
from embedq_consumer.rollout.followed_commands import Commands, FollowedCommands
from embedq_consumer.rollout.status_topic import Said
from embedq_shared.codec import encode_record
from embedq_shared.fleet import Turns, rollback_of
from embedq_shared.messages import Control
from embedq_shared.topics import Topics

log = structlog.get_logger()

_WRITE_AGAIN_S: Final = 3.0
"""A command that was written is read back within milliseconds; one that was not, as Kafka was away, is written again."""
_TIDY_S: Final = 60.0
"""Between two looks for statuses that nobody needs any more."""

Write = Callable[[Outgoing], Awaitable[Exception | None]]
"""Publishes a record within seconds; returns why it could not."""


class Statuses(Protocol):
    """What all replicas say, such as the status topic."""

    async def open(self) -> list[Said]:
        """What was said until now."""

    async def next(self) -> list[Said]:
        """What was said since the last call; waits a moment for it."""


class Voice(Protocol):
    """Says what this replica does, such as `StatusReporter`."""

    async def take_turn(self, version: int | None) -> None:
        """Say that this replica takes its turn of a command, or (None) that it does not."""


class FleetMember:
    """Takes this replica's turns, and writes the rollback of a command that a replica has failed in its turn.

    Life: `open`, `begin` and `commands`, in this order; then `run` for as long as the replica lives, and `turn` before each command.
    """

    def __init__(self, statuses: Statuses, topics: Topics, replica: str, alias: str, write: Write) -> None:
        self._statuses = statuses
        self._topics = topics
        self._write = write
        self._turns = Turns(replica, alias, topics.pool)
        self._heard = asyncio.Condition()
        self._desired: Control | None = None
        self._begins_before = False
        self._commands: FollowedCommands | None = None
        self._write_at = 0.0
        self._tidy_at = time.monotonic() + _TIDY_S

    async def open(self) -> None:
        """Read what the others have said. After an error it may be called again.

        Raises:
            KafkaError, TimeoutError: it cannot be read.
        """
        self._hear(await self._statuses.open())

    def begin(self, desired: Control | None) -> Control | None:
        """The command to begin with: `desired`, or where a roll-out of that is under way, one for what served before it. None where
        another pool serves the alias now: then this replica begins with what its settings say."""
        self._desired = desired
        if desired is not None and desired.pool != self._topics.pool:
            log.warning(
                "alias_of_another_pool", alias=desired.alias, pool=desired.pool, version=desired.version
            )
            return None
        self._begins_before = desired is not None and self._turns.begin(desired, time.time())
        if desired is None or not self._begins_before:
            return desired
        log.info("rollout_under_way", version=desired.version, begins_with=desired.fallback)
        return _before(desired)

    def commands(self, source: Commands) -> FollowedCommands:
        """The commands of `source`; before them the desired one, if this replica has begun with what served before it."""
        self._commands = FollowedCommands(
            source, self._desired, follow_it=self._begins_before, pool=self._topics.pool
        )
        return self._commands

    async def turn(self, command: Control, voice: Voice) -> None:
        """Wait until it is this replica's turn to follow a command. The turn ends with the status that says how following it
        ended.

        Raises:
            ModelRejected: another replica has failed it, and nothing is known to go back to.
        """
        if command.rollout is None:
            return
        while True:
            async with self._heard:
                await self._heard.wait_for(
                    lambda: self._turns.may_claim(command, time.monotonic()) or self._is_lost(command)
                )
                if self._is_lost(command):
                    raise ModelRejected(f"not tried: {self._turns.failure(command)}")
                self._turns.claim(command, int(time.time() * 1000))
            await voice.take_turn(command.version)
            async with self._heard:
                await self._heard.wait_for(lambda: self._turns.granted is not None)
            if self._turns.granted:
                log.info("turn_taken", version=command.version)
                return
            await voice.take_turn(None)

    def _is_lost(self, command: Control) -> bool:
        """Whether a command has failed and nobody will take it back, since nothing is known to go back to."""
        final = command.rollback_of is None and rollback_of(command, "") is None
        return final and self._turns.failure(command) is not None

    async def run(self) -> None:
        """Listen to the others, take back what has failed, and tidy up, until cancelled."""
        while True:
            said = await self._statuses.next()
            async with self._heard:
                self._hear(said)
                self._heard.notify_all()
            now = time.monotonic()
            await self._take_back(now)
            await self._tidy(now)

    def _hear(self, said: Iterable[Said]) -> None:
        now = time.monotonic()
        for one in said:
            if one.status is None:
                self._turns.forget(one.key)
            else:
                self._turns.see(one.key, one.status, now)

    async def _take_back(self, now: float) -> None:
        """Write the rollback of the command in force, if that has failed, and until somebody's is read back."""
        commands = self._commands
        if commands is None or (newest := commands.newest) is None or now < self._write_at:
            return
        reason = self._turns.rollback_due(newest, now)
        rollback = None if reason is None else rollback_of(newest, reason)
        # A rollback that lost the race against an operator's command must not be what compaction keeps.
        command = rollback or (newest if commands.stray is not None else None)
        if command is None:
            return
        self._write_at = now + _WRITE_AGAIN_S
        commands.stray = None
        record = Outgoing(
            topic=self._topics.control,
            partition=0,
            key=command.alias.encode(),
            value=encode_record(command),
            headers=[],
        )
        problem = await self._write(record)
        if problem is not None:
            log.warning("rollback_not_written", version=command.version, reason=str(problem))
        elif rollback is not None:
            log.warning("rollback_written", version=command.version, path=command.path, reason=reason)

    async def _tidy(self, now: float) -> None:
        """Take away the statuses of replicas that are long gone."""
        if now < self._tidy_at:
            return
        self._tidy_at = now + _TIDY_S
        for key in self._turns.long_gone(time.time()):
            await self._write(
                Outgoing(topic=self._topics.status, partition=None, key=key.encode(), value=None, headers=[])
            )


def _before(command: Control) -> Control | None:
    """A command for what served before this one; None if that is not known. Should it be gone, this one's model serves."""
    if command.fallback is None or command.version == 1:
        return None
    return Control(
        alias=command.alias,
        version=command.version - 1,
        path=command.fallback,
        command_id=f"before-{command.command_id[:200]}",
        quantization=command.fallback_quantization,
        policy=command.policy,
        fallback=command.path,
        fallback_quantization=command.quantization,
    )
