"""Which command of the control topic applies to this replica."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from embedq_shared.messages import Control


class Ignored(msgspec.Struct, frozen=True):
    """A command that is not applied, and why not.

    `reason` is None for a repeat of the command in force, or of the one that is to be applied: that has an outcome of its own.
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
        before = self._in_force
        if before is not None and newest.version <= before.version:
            applied, reason = None, f"expected a version above {before.version}"
        else:
            applied = self._in_force = newest
            reason = f"superseded by version {newest.version}"
        answered = {command.command_id for command in (before, applied) if command is not None}
        ignored = tuple(
            Ignored(command, None if command.command_id in answered else reason)
            for command in commands
            if command is not applied
        )
        return Decision(applied, ignored)
