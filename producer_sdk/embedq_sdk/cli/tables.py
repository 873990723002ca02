"""Replicas, models and lag as tables and lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from embedq_sdk.admin.control import ServiceStatus
from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate
from embedq_shared.messages import State
from embedq_shared.topics import DEFAULT_POOL

_COLORS: Final = {"READY": "green", "FAILED": "red", "LOADING": "yellow", "STOPPED": "dim"}


def short(model_version: str | None) -> str:
    """The beginning of a model version, enough to tell two apart."""
    return "-" if model_version is None else model_version[:19]


def _colored(state: State) -> str:
    return f"[{_COLORS[state]}]{state}[/]"


def replica_table(replicas: Sequence[ReplicaView], title: str) -> Table:
    """One row for each replica: itself, then its last command."""
    table = Table(title=title, title_justify="left")
    pool = _pool_columns(replicas)
    for column in (
        "replica",
        *pool,
        "alias",
        "state",
        "model",
        "age",
        "version",
        "step",
        "outcome",
        "error",
    ):
        table.add_column(column)
    for replica in replicas:
        table.add_row(
            escape(replica.replica),
            *(_pool(replica) for _ in pool),
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


def rollout_table(update: RolloutUpdate) -> Table:
    """One row for each replica: how far it is with the command, and what it serves meanwhile."""
    title = f"{escape(update.alias)} version {update.version}"
    if update.rollback_version is not None:
        title += f": taken back by version {update.rollback_version}"
    table = Table(title=title, title_justify="left", caption=escape(update.reason or "") or None)
    for column in ("replica", "step", "outcome", "serves", "directory", "error"):
        table.add_column(column)
    for replica in update.replicas:
        table.add_row(
            escape(replica.replica),
            _step(replica),
            "-" if replica.outcome is None else _colored(replica.outcome),
            short(replica.model_version),
            escape(replica.path or "-"),
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
            yield f"{replica.replica}: {standing[0]} {standing[1]} (version {version}){error}"
    if now.rollback_version is not None and (before is None or before.rollback_version is None):
        yield f"{now.alias} version {now.version} failed: {now.reason}; version {now.rollback_version} brings the old model back"
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
        f"{escape(r.replica)} {escape(r.alias)} {r.state} {_pool_word(r)}model={short(r.model_version)} age={r.age_s:.0f}s "
        f"version={'-' if r.version is None else r.version} step={r.step} outcome={r.outcome or '-'}"
        + (f" error={escape(r.error)}" if r.error else "")
        for r in status.replicas
    ]
    return [*rows, *lag]


def model_lines(replicas: Sequence[ReplicaView], *, plain: bool) -> Sequence[Table | str]:
    """What `embedq models` shows: what each replica serves, as a table, or as plain lines where the output is not a terminal."""
    if not replicas:
        return ["no live replicas"]
    if plain:
        return [
            f"{escape(r.replica)} {escape(r.alias)} {r.state} {_pool_word(r)}directory={escape(r.path or '-')} model={r.model_version or '-'} "
            f"version={_or_dash(r.version)} step={r.step} dimensions={_or_dash(r.dimensions)} max_tokens={_or_dash(r.max_tokens)} "
            f"memory={memory(r)}"
            for r in replicas
        ]
    table = Table(title="models", title_justify="left")
    pool = _pool_columns(replicas)
    for column in (
        *(
            "replica",
            *pool,
            "alias",
            "state",
            "directory",
            "model",
            "version",
            "step",
            "dimensions",
            "max tokens",
            "memory",
        ),
    ):
        table.add_column(column)
    for r in replicas:
        table.add_row(
            *(
                escape(r.replica),
                *(_pool(r) for _ in pool),
                escape(r.alias),
                _colored(r.state),
                escape(r.path or "-"),
                short(r.model_version),
            ),
            *(_or_dash(r.version), r.step, _or_dash(r.dimensions), _or_dash(r.max_tokens), memory(r)),
        )
    return [table]


def memory(replica: ReplicaView) -> str:
    """A device's memory, or a process's and its machine's: used of how much, in GB."""
    if replica.memory_used is None or replica.memory_total is None:
        return "-"
    return f"{replica.memory_used / 1e9:.1f}/{replica.memory_total / 1e9:.1f}GB"


def _pool_columns(replicas: Iterable[ReplicaView]) -> tuple[str, ...]:
    """A column for the pools, where there is another one than the default one."""
    return ("pool",) if any(replica.pool is not None for replica in replicas) else ()


def _pool(replica: ReplicaView) -> str:
    return escape(replica.pool or DEFAULT_POOL)


def _pool_word(replica: ReplicaView) -> str:
    return "" if replica.pool is None else f"pool={escape(replica.pool)} "


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _step(replica: ReplicaView) -> str:
    if replica.waiting:
        return "waiting"
    warms = replica.step == "check" and replica.outcome == "LOADING" and replica.warmed is not None
    return "warming the cache" if warms else replica.step


def _standing(replica: ReplicaView) -> tuple[State, str, int | None]:
    """How a replica stands with its command."""
    return replica.outcome or replica.state, _step(replica), replica.version
