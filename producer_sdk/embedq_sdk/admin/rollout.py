"""How a reload stands, as the status and control topics say. Pure: time is an argument."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from embedq_shared.fleet import (
    StatusBoard,
    died_in_soak,
    failed_in_soak,
    failed_in_turn,
    is_live,
    rollback_of,
)
from embedq_shared.messages import STATUS_INTERVAL_S, Control, State, Status, Step

Progress = Literal["running", "ready", "failed", "rolled_back", "timeout", "no_replicas", "superseded"]

NO_REPLICAS_AFTER_S: Final = 2 * STATUS_INTERVAL_S
"""By then every live replica has repeated its status."""
_ROLLBACK_AFTER_S: Final = 10.0
"""Replicas take a failed command back within seconds. Later they cannot, as they may not write commands, and the watcher does."""


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as its last status describes it.

    `state` is the replica's: READY as long as a model serves, whatever became of a reload. `outcome` is that of its last
    command, `version`: None before the first, else LOADING, READY or FAILED, with the `step` that it has come to and the
    `error` that ended it there; `warmed` is how many vectors the cache got for it before it served, None where that is not asked for. `path` is the directory that serves, as a command would name it. `memory_used` and `memory_total`
    are bytes of its device, on a CPU of its process and machine.
    """

    replica: str
    alias: str
    state: State
    step: Step
    version: int | None
    outcome: State | None = None
    model_version: str | None
    error: str | None
    age_s: float
    answered: bool = False
    """Whether it has said READY or FAILED for the reload that is watched."""
    waiting: bool = False
    """Whether it waits for its turn in the reload that is watched."""
    path: str | None = None
    dimensions: int | None = None
    max_tokens: int | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    warmed: int | None = None
    pool: str | None = None
    """None for the default pool."""


class RolloutUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """How a reload stands. Its last update is the first whose `progress` is not "running".

    "ready": every live replica serves the new model. "rolled_back": a replica failed in its turn, and every live replica serves
    the model of before again. "failed": every live replica has answered, and at least one keeps its old model; where a roll-out has
    failed, it could not be taken back everywhere. "timeout": some have not answered in time. "no_replicas": there is no live
    replica. In both cases the command stays on the control topic and replicas will follow it. "superseded": a later command took
    its place.
    """

    alias: str
    version: int
    command_id: str
    progress: Progress
    replicas: tuple[ReplicaView, ...]
    rollback_version: int | None = None
    """The command that takes this one back, as soon as there is one."""
    reason: str | None = None
    """Why it is taken back."""

    @property
    def done(self) -> bool:
        """Whether this is the last update."""
        return self.progress != "running"

    @property
    def ok(self) -> bool:
        """Whether every live replica serves the new model."""
        return self.progress == "ready"

    @property
    def mixed(self) -> bool:
        """Whether live replicas serve different models."""
        return len({replica.model_version for replica in self.replicas}) > 1


def view_of(status: Status, now: float, *, answered: bool = False, waiting: bool = False) -> ReplicaView:
    """A status as it looks at epoch seconds `now`."""
    return ReplicaView(
        replica=status.replica,
        alias=status.alias,
        state=_state_of(status),
        step=status.step,
        version=status.version,
        outcome=None if status.version is None else status.state,
        model_version=status.model_version,
        error=status.error,
        age_s=max(0.0, now - status.at / 1000),
        answered=answered,
        waiting=waiting,
        path=status.path,
        dimensions=status.dimensions,
        max_tokens=status.max_tokens,
        memory_used=status.memory_used,
        memory_total=status.memory_total,
        warmed=status.warmed,
        pool=status.pool,
    )


def _state_of(status: Status) -> State:
    """The replica's, apart from its command's. One that does not say whether it serves does so once a command has failed."""
    if status.state == "STOPPED":
        return "STOPPED"
    serves = status.state in ("READY", "FAILED") if status.serving is None else status.serving
    return "READY" if serves else "LOADING"


class RolloutView:
    """One reload command, and how the live replicas answer it. `started`, `now` and `heard` are epoch seconds, `timeout` seconds.

    Invariants:
        - A replica has answered once it says READY or FAILED for this command, by version and id.
        - Replicas that start meanwhile count; one that falls silent counts until its last status is stale.
        - Once there is a rollback of the command, that is the one to be answered.
        - What was not read yet says nothing: a replica is silent by the time up to which the statuses were `heard`.
        - A replica that follows a later command, or another one with the same version, ends the reload as "superseded".
          That it refuses another one of the same version, which came later, does not.
    """

    def __init__(self, board: StatusBoard, command: Control, *, started: float, timeout: float) -> None:
        self._board = board
        self._command = command
        self._target = command
        self._started = started
        self._timeout = timeout
        self._failed_at: float | None = None
        self._reason: str | None = None

    def take(self, command: Control) -> None:
        """Take a later command of the alias."""
        rollback = rollback_of(self._command, "")
        if rollback is not None and command.command_id == rollback.command_id:
            self._target = command

    def at(self, now: float, heard: float | None = None) -> RolloutUpdate:
        """How the reload stands at `now`, by what was `heard` until then; None: everything."""
        heard = now if heard is None else heard
        live = self._live(heard)
        self._notice_rollback(live)
        if self._failed_at is None and (reason := self._failure(heard)) is not None:
            self._failed_at, self._reason = now, reason
        taken_back = self._target is not self._command
        return RolloutUpdate(
            alias=self._command.alias,
            version=self._command.version,
            command_id=self._command.command_id,
            progress=self._progress(live, now, heard),
            replicas=tuple(
                view_of(status, now, answered=self._answered(status), waiting=self._waits(status))
                for status in live
            ),
            rollback_version=self._target.version if taken_back else None,
            reason=(self._target.reason if taken_back else None) or self._reason,
        )

    def overdue_rollback(self, now: float) -> Control | None:
        """The rollback that the replicas should have written, but have not."""
        if self._target is not self._command or self._failed_at is None or self._reason is None:
            return None
        return (
            rollback_of(self._command, self._reason) if now - self._failed_at >= _ROLLBACK_AFTER_S else None
        )

    def _notice_rollback(self, live: list[Status]) -> None:
        """Statuses may tell of a command before the control topic does."""
        rollback = rollback_of(self._command, "")
        if self._target is self._command and rollback is not None:
            for status in live:
                if (status.version, status.command_id) == (rollback.version, rollback.command_id):
                    self._target = rollback
                    return

    def _failure(self, heard: float) -> str | None:
        """Why a replica fails the roll-out, if one does."""
        if self._command.rollout is None:
            return None
        live = self._live(heard)
        for status in self._board.all():
            if (status.alias, status.pool) == (self._command.alias, self._command.pool):
                silent = not is_live(status, heard)
                if reason := failed_in_turn(self._command, status, silent=silent):
                    return reason
                if silent and (reason := died_in_soak(self._command, status, live)):
                    return reason
        return failed_in_soak(self._command, live)

    def _live(self, heard: float) -> list[Status]:
        """The statuses of the live replicas that follow."""
        return self._board.followers(heard, self._command.alias, self._command.pool)

    def _progress(self, live: list[Status], now: float, heard: float) -> Progress:
        if any(self._is_of_another(status) for status in live):
            return "superseded"
        if live and all(self._answered(status) for status in live):
            ready = all(status.state == "READY" for status in live)
            if self._target is not self._command:
                return "rolled_back" if ready else "failed"
            if ready:
                return "ready"
            if not self._awaits_rollback():
                return "failed"
        elif self._is_halted(live):
            return "failed"
        over = now - self._started >= self._timeout
        if not live and (over or heard - self._started >= NO_REPLICAS_AFTER_S):
            return "no_replicas"
        return "timeout" if over else "running"

    def _awaits_rollback(self) -> bool:
        return self._failed_at is not None and rollback_of(self._command, "") is not None

    def _is_halted(self, live: list[Status]) -> bool:
        """Whether the roll-out has failed, and nothing is known to go back to: those that wait will wait for ever."""
        if self._failed_at is None or self._target is not self._command or self._awaits_rollback():
            return False
        return all(self._answered(status) or self._waits(status) for status in live)

    def _answered(self, status: Status) -> bool:
        return self._is_of_target(status) and status.state in ("READY", "FAILED")

    def _waits(self, status: Status) -> bool:
        if self._target.rollout is None or status.turn is not None or status.serving is False:
            return False
        behind = status.version is None or status.version < self._target.version
        return behind or (self._is_of_target(status) and status.state == "LOADING")

    def _is_of_target(self, status: Status) -> bool:
        target = self._target
        return status.version == target.version and status.command_id in (None, target.command_id)

    def _is_of_another(self, status: Status) -> bool:
        target = self._target
        if status.version is None or status.version < target.version:
            return False
        if status.version > target.version:
            return True
        return status.command_id not in (None, target.command_id) and status.state != "FAILED"
