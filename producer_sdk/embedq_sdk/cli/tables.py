"""Replicas and lag as tables and lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from embedq_sdk.admin.control import ServiceStatus
from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate
from embedq_shared.messages import State, Step

_COLORS: Final = {"READY": "green", "FAILED": "red", "LOADING": "yellow", "STOPPED": "dim"}


def short(model_version: str | None) -> str:
    """The beginning of a model version, enough to tell two apart."""
    return "-" if model_version is None else model_version[:19]


def _colored(state: State) -> str:
    return f"[{_COLORS[state]}]{state}[/]"


def replica_table(replicas: Iterable[ReplicaView], title: str) -> Table:
    """One row for each replica: itself, then its last command."""
    table = Table(title=title, title_justify="left")
    for column in ("replica", "alias", "state", "model", "age", "version", "step", "outcome", "error"):
        table.add_column(column)
    for replica in replicas:
        table.add_row(
            escape(replica.replica),
            escape(replica.alias),
            _colored(replica.state),
            short(replica.model_version),
            f"{replica.age_s:.0f} s",
            "-" if replica.version is None else str(replica.version),
            replica.step,
            "-" if replica.outcome is None else _colored(replica.outcome),
            escape(replica.error or ""),
        )
    return table


def replica_lines(before: RolloutUpdate | None, now: RolloutUpdate) -> Iterator[str]:
    """A line for each replica that changed between two updates."""
    known = {r.replica: _standing(r) for r in before.replicas} if before else {}
    if before is None:
        yield f"{now.alias} version {now.version}: {len(now.replicas)} live replicas"
    for replica in now.replicas:
        if known.pop(replica.replica, None) != (standing := _standing(replica)):
            error = f": {replica.error}" if replica.error else ""
            version = "-" if replica.version is None else replica.version
            yield f"{replica.replica}: {standing[0]} {replica.step} (version {version}){error}"
    for replica_id in known:
        yield f"{replica_id}: gone"


def status_lines(status: ServiceStatus, *, plain: bool) -> Sequence[Table | str]:
    """What `embedq status` shows: tables, or plain lines where the output is not a terminal."""
    lag = [f"{lane.topic}: {lane.jobs} jobs waiting" for lane in status.lag]
    lag += [f"{tier.topic}: {tier.jobs} jobs waiting for another run" for tier in status.retries if tier.jobs]
    if not status.replicas:
        return ["no live replicas", *lag]
    if not plain:
        return [replica_table(status.replicas, "replicas"), *lag]
    rows = [
        f"{escape(r.replica)} {escape(r.alias)} {r.state} model={short(r.model_version)} age={r.age_s:.0f}s "
        f"version={'-' if r.version is None else r.version} step={r.step} outcome={r.outcome or '-'}"
        + (f" error={escape(r.error)}" if r.error else "")
        for r in status.replicas
    ]
    return [*rows, *lag]


def _standing(replica: ReplicaView) -> tuple[State, Step, int | None]:
    """How a replica stands with its command."""
    return replica.outcome or replica.state, replica.step, replica.version
