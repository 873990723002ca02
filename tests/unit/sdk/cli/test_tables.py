"""What `embedq status` and `embedq reload` print."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from embedq_sdk.admin.control import LaneLag, ServiceStatus
from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate
from embedq_sdk.cli.tables import model_lines, replica_lines, status_lines


def a_replica(**more: Any) -> ReplicaView:
    known: dict[str, Any] = {
        "replica": "r1",
        "alias": "default",
        "state": "READY",
        "step": "check",
        "version": 3,
        "outcome": "FAILED",
        "model_version": "sha256:0123456789abcdef",
        "error": "config.json: missing",
        "age_s": 1.2,
    }
    return ReplicaView(**(known | more))


def shown(*replicas: ReplicaView, plain: bool) -> str:
    tiers = [LaneLag(topic="embed.retry.1", jobs=0), LaneLag(topic="embed.retry.2", jobs=4)]
    status = ServiceStatus(replicas=list(replicas), lag=[LaneLag(topic="embed.jobs", jobs=2)], retries=tiers)
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        for line in status_lines(status, plain=plain):
            console.print(line, soft_wrap=True)
    return capture.get()


def test_a_replica_that_serves_after_a_refused_reload_is_ready_and_the_reload_failed() -> None:
    assert shown(a_replica(), plain=True).splitlines() == [
        "r1 default READY model=sha256:0123456789ab age=1s version=3 step=check outcome=FAILED error=config.json: missing",
        "embed.jobs: 2 jobs waiting",
        "embed.retry.2: 4 jobs waiting for another run",
    ]


@pytest.mark.parametrize(("outcome", "word"), [("FAILED", "FAILED"), (None, "-")])
def test_a_table_has_both(outcome: Any, word: str) -> None:
    [row] = [
        line for line in shown(a_replica(outcome=outcome), plain=False).splitlines() if "default" in line
    ]
    cells = [cell.strip() for cell in row.split("│") if cell.strip()]
    assert cells[:3] == ["r1", "default", "READY"]
    assert cells[6:8] == ["check", word]


@pytest.mark.parametrize("plain", [True, False])
def test_pools_are_shown_where_there_is_another_than_the_default_one(plain: bool) -> None:
    alone, beside = a_replica(), a_replica(replica="r2", alias="large", pool="big")

    def pools(*replicas: ReplicaView) -> str:
        console = Console(width=200, force_terminal=False)
        with console.capture() as capture:
            for line in model_lines(replicas, plain=plain):
                console.print(line, soft_wrap=True)
        return shown(*replicas, plain=plain) + capture.get()

    assert "pool" not in pools(alone)
    both = pools(alone, beside)
    assert both.count("big") == 2
    assert both.count("pool=big" if plain else "pool") == 2


def test_a_reload_shows_how_the_command_stands() -> None:
    update = RolloutUpdate(
        alias="default", version=3, command_id="c", progress="failed", replicas=(a_replica(),)
    )
    assert list(replica_lines(None, update)) == [
        "default version 3: 1 live replicas",
        "r1: FAILED check (version 3): config.json: missing",
    ]
