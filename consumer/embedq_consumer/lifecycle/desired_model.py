"""Which command of the control topic applies to this replica."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from embedq_shared.messages import Control


class Ignored(msgspec.Struct, frozen=True):
    """A command that is not applied, and why not.

    `reason` is None for a repeat of the command in force: that one has its outcome already.
    """

    command: Control
    reason: str | None


class Decision(msgspec.Struct, frozen=True):
    """What follows from some commands: at most one applies, and each of the others is ignored."""

    apply: Control | None
    ignored: tuple[Ignored, ...]


class DesiredModel:
    """The command in force, and which of the next ones replaces it. Pure.

    Invariants:
        - Versions only rise: a command whose version is not above that in force is ignored.
        - Of commands that arrive together only the newest may apply; of two with equal versions, the first.
        - Each command of a call is applied or ignored, exactly once.
        - A command is in force from the moment that it is to be applied, even if its model then fails.
    """

    def __init__(self, in_force: Control | None = None) -> None:
        self._in_force = in_force

    def decide(self, commands: Sequence[Control]) -> Decision:
        """What to do about these commands, in the order in which they were written; at least one."""
        newest = max(commands, key=lambda command: command.version)
        ignored = [
            self._ignore(command, f"superseded by version {newest.version}")
            for command in commands
            if command is not newest
        ]
        if self._in_force is not None and newest.version <= self._in_force.version:
            ignored.append(self._ignore(newest, f"expected a version above {self._in_force.version}"))
            return Decision(None, tuple(ignored))
        self._in_force = newest
        return Decision(newest, tuple(ignored))

    def _ignore(self, command: Control, reason: str) -> Ignored:
        repeated = self._in_force is not None and command.command_id == self._in_force.command_id
        return Ignored(command, None if repeated else reason)
