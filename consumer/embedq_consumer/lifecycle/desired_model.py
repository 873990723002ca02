"""Which command of the control topic applies to this replica, and when it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from embedq_shared.messages import Control

_QUIET_S: Final = 0.5
"""Commands of a burst come within milliseconds, those of people within seconds."""


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


class NextCommand:
    """The command to begin next. Pure; times are monotonic seconds.

    One that takes another one's place waits until none has come for a moment, so that a burst costs one load on the way to
    its last command, not one for each.
    """

    def __init__(self) -> None:
        self._command: Control | None = None
        self._due = 0.0

    def put(self, command: Control, now: float, *, supersedes: bool) -> Control | None:
        """Begin this one next. `supersedes`: another one is under way. Returns the one that waited and is never begun."""
        waited, self._command = self._command, command
        self._due = now + _QUIET_S if supersedes or waited is not None else now
        return waited

    def take(self, now: float) -> Control | None:
        """The command, if it is time to begin it."""
        if self._command is None or now < self._due:
            return None
        taken, self._command = self._command, None
        return taken

    def wait(self, now: float) -> float | None:
        """Seconds until it is time; None while no command waits."""
        return None if self._command is None else max(0.0, self._due - now)
