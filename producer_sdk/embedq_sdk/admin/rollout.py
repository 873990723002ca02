"""What the status topic says of the replicas, and how a reload stands. Pure: time is an argument."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from embedq_shared.messages import STATUS_INTERVAL_S, STATUS_STALE_AFTER_S, State, Status, Step

Progress = Literal["running", "ready", "failed", "timeout", "no_replicas", "superseded"]

NO_REPLICAS_AFTER_S: Final = 2 * STATUS_INTERVAL_S
"""By then every live replica has repeated its status."""


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as its last status describes it.

    `state` is the replica's: READY as long as a model serves, whatever became of a reload. `outcome` is that of its last
    command, `version`: None before the first, else LOADING, READY or FAILED, with the `step` that it has come to and the
    `error` that ended it there.
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


class RolloutUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """How a reload stands. Its last update is the first whose `progress` is not "running".

    "ready": every live replica serves the new model. "failed": every live replica has answered, and at least one keeps its
    old model. "timeout": some have not answered in time. "no_replicas": there is no live replica. In both cases the
    command stays on the control topic and replicas will follow it. "superseded": a later command took its place.
    """

    alias: str
    version: int
    command_id: str
    progress: Progress
    replicas: tuple[ReplicaView, ...]

    @property
    def done(self) -> bool:
        """Whether this is the last update."""
        return self.progress != "running"

    @property
    def ok(self) -> bool:
        """Whether every live replica serves the new model."""
        return self.progress == "ready"


def is_live(status: Status, now: float) -> bool:
    """Whether a replica's last status, at epoch seconds `now`, shows it alive."""
    return status.state != "STOPPED" and now - status.at / 1000 <= STATUS_STALE_AFTER_S


class StatusBoard:
    """The last status of every replica, alive or not."""

    def __init__(self) -> None:
        self._last: dict[str, Status] = {}

    def see(self, status: Status) -> None:
        """Take a status. They come in the topic's order, so the last one counts."""
        self._last[status.replica] = status

    def forget(self, replica: str) -> None:
        """Take a tombstone: compaction removed the replica's status."""
        self._last.pop(replica, None)

    def all(self) -> list[Status]:
        """The last status of each, those of replicas that are gone too."""
        return list(self._last.values())

    def live(self, now: float, alias: str | None = None) -> list[Status]:
        """The statuses of live replicas, sorted by name, of one alias or of all (None)."""
        return sorted(
            (s for s in self._last.values() if is_live(s, now) and alias in (None, s.alias)),
            key=lambda s: s.replica,
        )


def view_of(status: Status, now: float, *, answered: bool = False) -> ReplicaView:
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
        - What was not read yet says nothing: a replica is silent by the time up to which the statuses were `heard`.
        - A replica that follows a later command, or another one with the same version, ends the reload as "superseded".
          That it refuses another one of the same version, which came later, does not.
    """

    def __init__(
        self,
        board: StatusBoard,
        *,
        alias: str,
        version: int,
        command_id: str,
        started: float,
        timeout: float,
    ) -> None:
        self._board = board
        self._alias = alias
        self._version = version
        self._command_id = command_id
        self._started = started
        self._timeout = timeout

    def at(self, now: float, heard: float | None = None) -> RolloutUpdate:
        """How the reload stands at `now`, by what was `heard` until then; None: everything."""
        heard = now if heard is None else heard
        live = self._board.live(heard, self._alias)
        replicas = tuple(view_of(status, now, answered=self._answered(status)) for status in live)
        return RolloutUpdate(
            alias=self._alias,
            version=self._version,
            command_id=self._command_id,
            progress=self._progress(live, now, heard),
            replicas=replicas,
        )

    def _progress(self, live: list[Status], now: float, heard: float) -> Progress:
        if any(self._is_of_another(status) for status in live):
            return "superseded"
        if live and all(self._answered(status) for status in live):
            return "ready" if all(status.state == "READY" for status in live) else "failed"
        if not live and heard - self._started >= min(NO_REPLICAS_AFTER_S, self._timeout):
            return "no_replicas"
        return "timeout" if now - self._started >= self._timeout else "running"

    def _answered(self, status: Status) -> bool:
        ours = status.version == self._version and status.command_id in (None, self._command_id)
        return ours and status.state in ("READY", "FAILED")

    def _is_of_another(self, status: Status) -> bool:
        if status.version is None or status.version < self._version:
            return False
        if status.version > self._version:
            return True
        return status.command_id not in (None, self._command_id) and status.state != "FAILED"
