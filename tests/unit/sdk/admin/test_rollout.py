from __future__ import annotations

from typing import Any

import msgspec
import pytest

from embedq_sdk.admin.control import _next_command
from embedq_sdk.admin.rollout import RolloutUpdate, RolloutView, StatusBoard, view_of
from embedq_shared.codec import encode_record, read_command, read_status
from embedq_shared.messages import Control, Status

START = 1_000_000.0


def a_status(replica: str = "r1", *, at: float = START, **more: Any) -> Status:
    known: dict[str, Any] = {
        "replica": replica,
        "alias": "default",
        "version": 1,
        "step": "serving",
        "state": "READY",
        "model_version": None,
        "error": None,
        "at": int(at * 1000),
    }
    return Status(**(known | more))


def ours(replica: str = "r1", **more: Any) -> Status:
    known: dict[str, Any] = {"version": 2, "command_id": "c"}
    return a_status(replica, **(known | more))


def watch(*statuses: Status, now: float = START + 1, timeout: float = 60.0) -> RolloutUpdate:
    board = StatusBoard()
    for status in statuses:
        board.see(status)
    view = RolloutView(board, alias="default", version=2, command_id="c", started=START, timeout=timeout)
    return view.at(now)


def test_a_reload_is_through_when_every_live_replica_is_ready() -> None:
    update = watch(ours("r1"), ours("r2"))

    assert update.progress == "ready"
    assert update.ok
    assert update.done


def test_ready_for_an_earlier_command_is_no_answer() -> None:
    update = watch(ours("r1"), a_status("r2"))

    assert update.progress == "running"
    assert [replica.answered for replica in update.replicas] == [True, False]


def test_one_failed_replica_fails_the_reload_once_all_answered() -> None:
    failed = ours("r1", state="FAILED", step="load", error="no such directory")

    assert watch(failed, ours("r2", state="LOADING", step="load")).progress == "running"
    update = watch(failed, ours("r2"))
    assert update.progress == "failed"
    assert not update.ok
    assert update.replicas[0].error == "no such directory"


def test_a_replica_that_appears_meanwhile_counts() -> None:
    newcomer = a_status("r2", version=None, state="LOADING", step="starting")

    assert watch(ours("r1"), newcomer).progress == "running"


def test_a_replica_is_silent_by_the_time_up_to_which_the_statuses_were_read() -> None:
    """A reader whose event loop stood still would else call a rollout ready without the one that is slow."""
    board = StatusBoard()
    for status in (ours("r1", at=START + 60), a_status("r2", at=START)):
        board.see(status)
    rollout = RolloutView(board, alias="default", version=2, command_id="c", started=START, timeout=600)
    assert rollout.at(START + 60).progress == "ready"
    assert rollout.at(START + 60, START + 1).progress == "running"
    assert rollout.at(START + 601, START + 1).progress == "timeout"


def test_no_replica_is_missed_before_the_statuses_were_read_for_long_enough() -> None:
    rollout = RolloutView(
        StatusBoard(), alias="default", version=2, command_id="c", started=START, timeout=600
    )
    assert rollout.at(START + 60, START + 1).progress == "running"
    assert rollout.at(START + 60, START + 59).progress == "no_replicas"


def test_a_replica_that_fell_silent_counts_until_its_status_is_stale() -> None:
    silent = a_status("r2", at=START)

    assert watch(ours("r1", at=START + 15), silent, now=START + 15).progress == "running"
    assert watch(ours("r1", at=START + 15), silent, now=START + 15.1).progress == "ready"


def test_a_replica_that_stopped_does_not_count() -> None:
    assert watch(ours("r1"), a_status("r2", state="STOPPED", step="stopped")).progress == "ready"


def test_replicas_of_another_alias_do_not_count() -> None:
    assert watch(ours("r1"), a_status("r2", alias="other")).progress == "ready"


def test_nobody_there_is_said_after_two_status_intervals() -> None:
    assert watch(now=START + 5.9).progress == "running"
    assert watch(now=START + 6.0).progress == "no_replicas"


def test_time_runs_out() -> None:
    slow = ours("r1", at=START + 60, state="LOADING", step="load")

    assert watch(slow, now=START + 59.9).progress == "running"
    assert watch(slow, now=START + 60).progress == "timeout"


def test_a_later_command_ends_the_watch() -> None:
    assert watch(ours("r1"), a_status("r2", version=3, command_id="d")).progress == "superseded"
    assert watch(ours("r1"), a_status("r2", version=2, command_id="d")).progress == "superseded"


def test_a_replica_that_names_no_command_answers_by_version() -> None:
    assert watch(ours("r1", command_id=None)).progress == "ready"


def test_a_tombstone_removes_a_replica() -> None:
    board = StatusBoard()
    board.see(a_status("r1"))
    board.forget("r1")

    assert board.live(START) == []


def a_command(version: int = 1, **more: Any) -> Control:
    known: dict[str, Any] = {
        "alias": "default",
        "version": version,
        "path": f"/m{version}",
        "command_id": "c",
    }
    return Control(**(known | more))


def test_the_next_command_falls_back_to_what_a_live_replica_serves() -> None:
    new = a_command(path="/new")

    served = _next_command(new, [a_command(4), a_command(7, fallback="/old")], [a_status(version=7)])
    unproven = _next_command(
        new, [a_command(7, fallback="/old")], [a_status(version=7, state="FAILED"), a_status("r2", version=6)]
    )
    first = _next_command(new, [], [a_status(version=None)])

    assert (served.version, served.path, served.fallback) == (8, "/new", "/m7")
    assert (unproven.version, unproven.fallback) == (8, "/old")
    assert (first.version, first.fallback) == (1, None)


def test_a_control_topic_that_was_made_anew_does_not_begin_below_what_replicas_follow() -> None:
    new, live = a_command(path="/new"), [a_status(version=7), a_status("r2", version=None)]

    assert _next_command(new, [], live).version == 8
    assert _next_command(new, [a_command(2)], live).version == 8


# -- of commands that were written at once ------------------------------------------------------------------------------


def test_that_a_replica_refuses_a_later_command_of_the_same_version_does_not_supersede_ours() -> None:
    refused = ours(
        "r1", command_id="loser", step="validate", state="FAILED", error="expected a version above 2"
    )

    assert watch(refused, ours("r2")).progress == "running"
    assert watch(refused, ours("r1"), ours("r2")).progress == "ready"


# -- the replica, and its last command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state", "outcome"),
    [
        (ours(state="FAILED", step="check", error="why", serving=True), "READY", "FAILED"),
        (ours(state="LOADING", step="load", serving=True), "READY", "LOADING"),
        (ours(state="LOADING", step="load", serving=False), "LOADING", "LOADING"),
        (ours(state="STOPPED", step="stopped", serving=False), "STOPPED", "STOPPED"),
        (a_status(version=None, state="LOADING", step="starting", serving=False), "LOADING", None),
        (a_status(version=None, serving=True), "READY", None),
        # Older replicas do not say whether they serve.
        (ours(state="FAILED", step="check", error="why"), "READY", "FAILED"),
        (ours(state="LOADING", step="load"), "LOADING", "LOADING"),
    ],
)
def test_a_replica_is_one_thing_and_how_its_last_command_stands_another(
    status: Status, state: str, outcome: str | None
) -> None:
    view = view_of(status, START)

    assert (view.state, view.outcome) == (state, outcome)
    assert view.error == status.error


def test_a_status_counts_under_the_key_of_its_replica_alone() -> None:
    record = encode_record(ours("r1"))

    assert read_status(b"r1", record) == ours("r1")
    for key in (None, b"r2", b"\xff"):
        with pytest.raises(msgspec.ValidationError):
            read_status(key, record)


def test_a_command_counts_under_the_key_of_its_alias_alone() -> None:
    record = encode_record(a_command())

    assert read_command(b"default", record, "default") == a_command()
    for key in (None, b"other", b"\xff"):
        assert read_command(key, record, "default") is None
    for key, value, alias in ((b"other", record, "other"), (b"default", None, "default")):
        with pytest.raises(msgspec.DecodeError):
            read_command(key, value, alias)
