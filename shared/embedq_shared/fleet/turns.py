"""Whose turn it is to follow a command, decided by each replica alone from the records of all. Pure: time is an argument.

The status topic has one partition, so all replicas read one order of records. A replica that wants its turn says so in its
status (`turn`), and waits until it reads that record itself: it has its turn if the records before that one leave room for it,
and takes its word back otherwise. So nobody hands turns out, and nobody's death holds up the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from embedq_shared.fleet.board import is_live
from embedq_shared.fleet.soak import died_in_soak, failed_in_soak, has_stood, is_done, is_soaking
from embedq_shared.messages import STATUS_INTERVAL_S, STATUS_STALE_AFTER_S, Control, Status

__all__ = ["Turns", "failed_in_turn"]

_LONGEST_TICK_S: Final = 2 * STATUS_INTERVAL_S
"""Between two records of our own, what counts as the others' silence at most: where ours were missing as well, it was Kafka's."""
_PLACE_S: Final = STATUS_INTERVAL_S
"""How long one lets those before it go first: by then a replica that lives has said something."""
_FORGOTTEN_AFTER_S: Final = 3600.0
"""A status of a replica that is gone stays for an hour, for those who ask why it went."""


class _Heard(msgspec.Struct, frozen=True):
    """A replica's last status, and when it came on the clock of `Turns`."""

    status: Status
    at: float


class _Claim(msgspec.Struct, frozen=True):
    """Our own claim of a turn: in statuses from `since_ms` on, epoch milliseconds."""

    command: Control
    since_ms: int


def failed_in_turn(command: Control, status: Status, *, silent: bool) -> str | None:
    """Why a replica's last status fails the roll-out of a command; None if it does not.

    A replica that fails elsewhere, as one that starts where the directory is missing, fails for itself alone.
    """
    if status.turn != command.version or status.version != command.version:
        return None
    if status.command_id not in (None, command.command_id):
        return None
    if status.state == "FAILED":
        return f"{status.replica}: {status.error}"
    if silent and status.state == "LOADING":
        return _silent(status)
    return None


def _silent(status: Status) -> str:
    return f"{status.replica}: fell silent in step {status.step}"


def _is_successor(before: Status, status: Status) -> bool:
    """Whether a replica died in its turn, and another process of its name speaks. A process' versions only rise."""
    was_at_it = before.state == "LOADING" and before.turn is not None and before.turn == before.version
    return (
        was_at_it
        and status.turn is None
        and status.state != "STOPPED"
        and (status.version or 0) < (before.turn or 0)
    )


def _is_born_again(before: Status, status: Status) -> bool:
    """Whether a replica served, died, and another process of its name speaks."""
    served, starts = before.state == "READY", status.serving is False and status.state != "STOPPED"
    return served and starts and (status.version or 0) < (before.version or 0)


def _holds_turn(status: Status) -> bool:
    """Whether the replica is in its turn. One that failed in it has left it, and halts the roll-out instead."""
    return status.turn is not None and not (status.state == "FAILED" and status.version == status.turn)


class Turns:
    """The turns of one alias's replicas in one pool, as `replica` sees them. `now` is monotonic seconds.

    Invariants:
        - Of replicas that are heard of, at most `max_unavailable` are in their turn at once, and before the first of them is READY
          at most one if the command asks for a canary. None begins before one has served for the canary's soak time.
        - Nobody begins a turn of a command that a replica has failed in its turn, unless that command is a rollback: what can
          come back shall.
        - Silence is measured by our own records, as they come back: where those are missing too, nobody has fallen silent.
    """

    def __init__(self, replica: str, alias: str, pool: str | None = None) -> None:
        self._replica = replica
        self._alias = alias
        self._pool = pool
        self._heard: dict[str, _Heard] = {}
        self._clock = 0.0
        self._own_at: float | None = None
        self._claim: _Claim | None = None
        self._granted: bool | None = None
        self._open_since: tuple[int, float] | None = None
        self._failed_since: tuple[int, float] | None = None
        self._died: tuple[int, str] | None = None
        self._gone: Status | None = None
        """The last status of a process that served, and whose successor did not follow the same command any more."""

    def see(self, key: str, status: Status, now: float) -> None:
        """Take a status and its record's key, in the topic's order; our own ones too."""
        if (status.alias, status.pool) != (self._alias, self._pool):
            return
        if status.replica == self._replica:
            if self._own_at is not None:
                self._clock += min(now - self._own_at, _LONGEST_TICK_S)
            self._own_at = now
        before = self._heard.get(key)
        if before is not None and _is_successor(before.status, status):
            self._died = (before.status.version or 0, _silent(before.status))
        if before is not None and _is_born_again(before.status, status):
            self._gone = before.status
        self._heard[key] = _Heard(status, self._clock)
        if status.replica == self._replica:
            self._judge(status)

    def forget(self, key: str) -> None:
        """Take a tombstone."""
        self._heard.pop(key, None)

    def may_claim(self, command: Control, now: float) -> bool:
        """Whether to ask for the turn to follow a command now. Those with lower names go first, but are not waited for forever."""
        free = self._limit(command) - self._taken()
        if free <= 0 or self._is_halted(command):
            self._open_since = None
            return False
        if self._open_since is None or self._open_since[0] != command.version:
            self._open_since = (command.version, now)
        before = sum(1 for status in self._waiting(command) if status.replica < self._replica)
        return now - self._open_since[1] >= max(0, before - free + 1) * _PLACE_S

    def claim(self, command: Control, since_ms: int) -> None:
        """Our statuses from epoch milliseconds `since_ms` on claim a turn."""
        self._claim, self._granted = _Claim(command, since_ms), None

    @property
    def granted(self) -> bool | None:
        """Whether the turn that was claimed is ours; None until our own record has come back."""
        return self._granted

    def failure(self, command: Control) -> str | None:
        """Why the roll-out of a command has failed; None as long as it has not."""
        if self._died is not None and self._died[0] == command.version:
            return self._died[1]
        for heard in self._heard.values():
            if reason := failed_in_turn(command, heard.status, silent=self._is_silent(heard)):
                return reason
        if command.rollout is None or command.rollout.soak_s is None:
            return None
        live = list(self._live())
        dead = [heard.status for heard in self._heard.values() if self._is_silent(heard)]
        for status in dead if self._gone is None else [self._gone, *dead]:
            if reason := died_in_soak(command, status, live):
                return reason
        return failed_in_soak(command, live)

    def rollback_due(self, command: Control, now: float) -> str | None:
        """Why to take a command back now; None as long as there is no reason, or another replica has yet to do it."""
        if command.rollout is None or (reason := self.failure(command)) is None:
            self._failed_since = None
            return None
        if self._failed_since is None or self._failed_since[0] != command.version:
            self._failed_since = (command.version, now)
        place = sum(1 for status in self._live() if status.replica < self._replica)
        return reason if now - self._failed_since[1] >= place else None

    def begin(self, command: Control, wall: float) -> bool:
        """Whether a roll-out of a command is under way at epoch seconds `wall`: then a replica that starts begins with what served
        before, and takes its turn like the others. To be asked once, before this replica has said anything.
        """
        for heard in self._heard.values():
            if heard.status.replica == self._replica:
                reason = failed_in_turn(command, heard.status, silent=True)
                if reason is not None:
                    self._died = (command.version, reason)
                    return True
                if is_soaking(command, heard.status):
                    self._gone = heard.status
        return command.rollout is not None and any(
            is_live(heard.status, wall)
            and heard.status.serving is not False
            and not is_done(command, heard.status)
            for heard in self._heard.values()
            if heard.status.replica != self._replica
        )

    def long_gone(self, wall: float) -> list[str]:
        """Keys whose statuses nobody needs any more at epoch seconds `wall`. Only the first of the live replicas says some."""
        if any(status.replica < self._replica for status in self._live()):
            return []
        return [
            key
            for key, heard in self._heard.items()
            if heard.status.replica != self._replica
            and (heard.status.state == "STOPPED" or self._is_silent(heard))
            and wall - heard.status.at / 1000 > _FORGOTTEN_AFTER_S
        ]

    # -- what the records say -------------------------------------------------------------------------------------------

    def _judge(self, status: Status) -> None:
        claim = self._claim
        if claim is None or self._granted is not None:
            return
        if status.turn == claim.command.version and status.at >= claim.since_ms:
            free = self._limit(claim.command) - self._taken()
            self._granted = free > 0 and not self._is_halted(claim.command)

    def _limit(self, command: Control) -> float:
        rollout = command.rollout
        if rollout is None:
            return math.inf
        if rollout.canary and not any(is_done(command, heard.status) for heard in self._heard.values()):
            return 1
        if rollout.soak_s is not None and not has_stood(command, self._live()):
            return 0 if any(is_done(command, status) for status in self._live()) else 1
        return math.inf if rollout.max_unavailable is None else rollout.max_unavailable

    def _is_halted(self, command: Control) -> bool:
        return command.rollback_of is None and self.failure(command) is not None

    def _taken(self) -> int:
        """Turns of others. Whoever died in its turn holds none."""
        return sum(1 for status in self._others() if _holds_turn(status))

    def _waiting(self, command: Control) -> Iterator[Status]:
        """Others that have yet to follow a command and are not at it."""
        for status in self._others():
            if status.serving is not False and status.turn is None and not is_done(command, status):
                yield status

    def _others(self) -> Iterator[Status]:
        return (status for status in self._live() if status.replica != self._replica)

    def _live(self) -> Iterator[Status]:
        for heard in self._heard.values():
            if heard.status.state != "STOPPED" and not self._is_silent(heard):
                yield heard.status

    def _is_silent(self, heard: _Heard) -> bool:
        ours = heard.status.replica == self._replica
        return not ours and self._clock - heard.at > STATUS_STALE_AFTER_S
