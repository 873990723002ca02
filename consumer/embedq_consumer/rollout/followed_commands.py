"""The commands on their way to the reloader, and which of them is in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from embedq_shared.messages import Control


class Commands(Protocol):
    """Where commands come from, such as the control topic."""

    async def next(self) -> Sequence[Control]:
        """The commands since the last call, in order; waits for one."""


class FollowedCommands:
    """Hands on the commands of a source, and remembers the newest.

    Invariants:
        - `newest` is the command with the highest version, of equal versions the first: the one that every replica of its pool follows.
        - One for another pool is not handed on, nor one that it leaves behind: the alias has moved, and what serves here serves on.
    """

    def __init__(
        self, source: Commands, newest: Control | None, *, follow_it: bool, pool: str | None = None
    ) -> None:
        """`newest` is the newest one when the source begins; with `follow_it` it has still to be followed. `pool` is ours."""
        self._source = source
        self._pool = pool
        self._first = [newest] if newest is not None and follow_it else []
        self.newest = newest
        self.stray: Control | None = None
        """A rollback that came after the newest with the same version: it must not be what compaction keeps."""

    async def next(self) -> Sequence[Control]:
        """The commands since the last call, in order; waits for one."""
        if self._first:
            first, self._first = self._first, []
            return first
        while True:
            commands = await self._source.next()
            for command in commands:
                self._see(command)
            if ours := [command for command in commands if self._is_ours(command)]:
                return ours

    def _is_ours(self, command: Control) -> bool:
        newest = self.newest
        left = newest is not None and newest.pool != self._pool and newest.version >= command.version
        return command.pool == self._pool and not left

    def _see(self, command: Control) -> None:
        if self.newest is None or command.version > self.newest.version:
            self.newest, self.stray = command, None
        elif command.version == self.newest.version:
            lost = command.rollback_of is not None and command.command_id != self.newest.command_id
            self.stray = command if lost else None
