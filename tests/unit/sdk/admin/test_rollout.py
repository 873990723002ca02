from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from embedq_sdk.admin.commands import (
    NothingBefore,
    checked_pool,
    checked_soak,
    checked_wave,
    command_back,
    home_of,
    next_command,
    rollout_of,
)
from embedq_sdk.admin.rollout import RolloutUpdate, RolloutView, view_of
from embedq_sdk.admin.topics import wanted_topics
from embedq_sdk.errors import InvalidArgument
from embedq_shared.codec import encode_record, read_command, read_status
from embedq_shared.fleet import StatusBoard, rollback_of
from embedq_shared.messages import Control, Rollout, Status

START = 1_000_000.0
WAVES = Rollout(max_unavailable=1, canary=True)


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


def test_two_aliases_of_one_replica_do_not_overwrite_each_other() -> None:
    board = StatusBoard()
    board.see("r1", a_status("r1"))
    board.see("r1/other", a_status("r1", alias="other"))

    assert [(one.replica, one.alias) for one in board.live(START)] == [("r1", "default"), ("r1", "other")]
    board.forget("r1")
    assert [one.alias for one in board.live(START)] == ["other"]


def a_command(version: int = 1, **more: Any) -> Control:
    known: dict[str, Any] = {
        "alias": "default",
        "version": version,
        "path": f"/m{version}",
        "command_id": "c",
    }
    return Control(**(known | more))


def watch(
    *statuses: Status,
    now: float = START + 1,
    timeout: float = 60.0,
    rollout: Rollout | None = None,
    then: Sequence[Control] = (),
) -> RolloutUpdate:
    board = StatusBoard()
    for status in statuses:
        board.see(status.replica, status)
    command = a_command(2, path="/new", rollout=rollout, fallback="/old")
    view = RolloutView(board, command, started=START, timeout=timeout)
    for later in (command, *then):
        view.take(later)
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
        board.see(status.replica, status)
    rollout = RolloutView(board, a_command(2), started=START, timeout=600)
    assert rollout.at(START + 60).progress == "ready"
    assert rollout.at(START + 60, START + 1).progress == "running"
    assert rollout.at(START + 601, START + 1).progress == "timeout"


def test_no_replica_is_missed_before_the_statuses_were_read_for_long_enough() -> None:
    rollout = RolloutView(StatusBoard(), a_command(2), started=START, timeout=600)
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
    board.see("r1", a_status("r1"))
    board.forget("r1")

    assert board.live(START) == []


def test_the_next_command_falls_back_to_what_a_live_replica_serves() -> None:
    new = a_command(path="/new")

    served = next_command(new, [a_command(4), a_command(7, fallback="/old")], [a_status(version=7)])
    unproven = next_command(
        new, [a_command(7, fallback="/old")], [a_status(version=7, state="FAILED"), a_status("r2", version=6)]
    )
    first = next_command(new, [], [a_status(version=None)])

    assert (served.version, served.path, served.fallback) == (8, "/new", "/m7")
    assert (unproven.version, unproven.fallback) == (8, "/old")
    assert (first.version, first.fallback) == (1, None)


def test_a_control_topic_that_was_made_anew_does_not_begin_below_what_replicas_follow() -> None:
    new, live = a_command(path="/new"), [a_status(version=7), a_status("r2", version=None)]

    assert next_command(new, [], live).version == 8
    assert next_command(new, [a_command(2)], live).version == 8


def test_the_fallback_is_what_the_replicas_say_that_they_serve() -> None:
    new, live = (
        a_command(path="/new"),
        [a_status(serving=True, path="x"), a_status("r2", serving=True, path="x")],
    )

    assert next_command(new, [], live).fallback == "x"
    told = next_command(new, [a_command(7, fallback="/old", fallback_quantization="fp8")], live)
    assert (told.fallback, told.fallback_quantization) == ("x", "fp8")
    differ = [*live, a_status("r3", serving=True, path="y")]
    assert next_command(new, [a_command(7, fallback="/old")], differ).fallback == "/old"


def test_a_rollout_that_is_not_through_is_nothing_to_fall_back_to() -> None:
    new, current = a_command(path="/new"), a_command(7, fallback="/old", rollout=WAVES, quantization="fp8")

    halfway = next_command(new, [current], [a_status(version=7), a_status("r2", version=6)])
    assert (halfway.fallback, halfway.fallback_quantization) == ("/old", None)
    through = next_command(new, [current], [a_status(version=7), a_status("r2", version=7)])
    assert (through.fallback, through.fallback_quantization) == ("/m7", "fp8")
    assert next_command(new, [current], []).fallback == "/old"


# -- pools --------------------------------------------------------------------------------------------------------------


def test_a_command_stays_where_its_alias_lives_unless_it_is_told_where_to_go() -> None:
    at_home, in_big = a_command(3), a_command(4, alias="a", pool="big")
    one, other = a_status(alias="a"), a_status("r2", alias="a", pool="big")

    assert home_of("a", None, [], []) is None
    assert home_of("a", None, [at_home, in_big], [one]) == "big"
    assert home_of("a", "default", [in_big], [other]) is None
    assert home_of("a", "huge", [in_big], [other]) == "huge"
    assert home_of("a", None, [], [other]) == "big", "where it is served"
    with pytest.raises(InvalidArgument, match="`pool`: expected one of big, default"):
        home_of("a", None, [], [one, other])
    with pytest.raises(InvalidArgument, match="`pool`: expected default for the alias default"):
        home_of("default", "big", [], [])
    for wrong in ("bulk", "a.b", 7):
        with pytest.raises(InvalidArgument, match="`pool`"):
            checked_pool(wrong)  # type: ignore[arg-type]


def test_a_command_that_moves_an_alias_falls_back_to_what_serves_there() -> None:
    moves = a_command(path="/new", pool="big")
    before = a_command(7, fallback="/old")
    here = a_status(version=7, serving=True, path="m7")
    there = a_status("r2", version=None, serving=True, path="configured", pool="big")

    found = next_command(moves, [before], [here, there])
    assert (found.version, found.pool, found.fallback) == (8, "big", "configured")
    assert next_command(moves, [before], [here]).fallback is None, "another pool's directory is none of ours"
    back = next_command(a_command(path="/m7"), [found], [here, there])
    assert (back.version, back.pool, back.fallback) == (9, None, "m7")


def test_a_rollback_stays_in_the_pool_of_what_it_takes_back() -> None:
    current = a_command(7, alias="a", fallback="/old", pool="big", rollout=WAVES)
    assert command_back("a", [current], []).pool == "big"
    rollback = rollback_of(current, "why")
    assert rollback is not None
    assert rollback.pool == "big"


def test_replicas_of_another_pool_are_not_waited_for_and_fail_nothing() -> None:
    command = a_command(2, pool="big", rollout=WAVES)
    board = StatusBoard()
    for status in (
        ours(pool="big"),
        ours("r2", version=1, command_id="before"),
        ours("r3", state="FAILED", turn=2, error="of another pool"),
        ours("r4", version=9, command_id="later"),
    ):
        board.see(status.replica, status)

    update = RolloutView(board, command, started=START, timeout=60.0).at(START + 1)
    assert update.progress == "ready"
    assert [(replica.replica, replica.pool) for replica in update.replicas] == [("r1", "big")]


def test_a_pool_has_topics_of_its_own_and_none_of_those_that_are_shared() -> None:
    found = wanted_topics("e", partitions=5, reply_partitions=2, retry_tiers=1, pool="big")
    assert [(topic.name, topic.partitions) for topic in found] == [
        ("e.jobs.big", 5),
        ("e.jobs.big.bulk", 5),
        ("e.retry.big.1", 5),
    ]
    alike = {topic.name: topic.config for topic in wanted_topics("e", partitions=5, reply_partitions=2)}
    assert found[0].config == alike["e.jobs"]


def test_the_command_back_swaps_a_command_and_what_served_before() -> None:
    current = a_command(7, fallback="/old", policy="resource_preserving", quantization="fp8")

    back = command_back("default", [a_command(3), current], [a_status(version=8)])
    assert (back.version, back.path, back.fallback, back.rollback_of) == (9, "/old", "/m7", 7)
    assert (back.quantization, back.fallback_quantization, back.policy) == (
        None,
        "fp8",
        "resource_preserving",
    )


@pytest.mark.parametrize(
    ("earlier", "reason"),
    [
        ([], "no command was ever written"),
        ([a_command(2)], "version 2 does not say what served before"),
        ([a_command(2, path="/m", fallback="/m")], "/m, which version 2 names, is what served before"),
    ],
)
def test_where_nothing_is_known_to_go_back_to_there_is_no_command(
    earlier: list[Control], reason: str
) -> None:
    with pytest.raises(NothingBefore, match=reason):
        command_back("default", earlier, [])


@pytest.mark.parametrize(
    ("wave", "canary", "live", "found"),
    [
        ("25%", True, 3, Rollout(max_unavailable=1, canary=True)),
        ("25%", False, 8, Rollout(max_unavailable=2)),
        ("100%", False, 8, Rollout(max_unavailable=8)),
        (3, True, 1, Rollout(max_unavailable=3, canary=True)),
        (None, True, 5, Rollout(canary=True)),
        (None, False, 5, None),
        ("1%", False, 0, Rollout(max_unavailable=1)),
    ],
)
def test_a_wave_is_a_number_of_the_live_replicas(
    wave: int | str | None, canary: bool, live: int, found: Rollout | None
) -> None:
    assert rollout_of(checked_wave(wave), canary, live) == found


@pytest.mark.parametrize("wave", [0, -1, True, "0%", "101%", "25", "all", 1.5])
def test_what_is_no_wave_is_refused(wave: Any) -> None:
    with pytest.raises(InvalidArgument, match="max_unavailable"):
        checked_wave(wave)


# -- in waves -----------------------------------------------------------------------------------------------------------

BROKEN: dict[str, Any] = {"state": "FAILED", "step": "load", "turn": 2, "error": "no such file"}
BACK = rollback_of(a_command(2, path="/new", fallback="/old"), "r1: no such file")
assert BACK is not None


def back(replica: str, **more: Any) -> Status:
    assert BACK is not None
    known: dict[str, Any] = {"version": 3, "command_id": BACK.command_id}
    return a_status(replica, **(known | more))


def test_those_that_wait_for_their_turn_are_shown() -> None:
    update = watch(
        ours("r1", state="LOADING", step="load", turn=2),
        ours("r2", state="LOADING", step="validate"),
        a_status("r3"),
        rollout=WAVES,
    )

    assert [replica.waiting for replica in update.replicas] == [False, True, True]
    assert update.progress == "running"


def test_a_failure_is_not_the_end_before_all_have_gone_back() -> None:
    failed = watch(ours("r1", **BROKEN), ours("r2"), rollout=WAVES)
    assert (failed.progress, failed.reason, failed.rollback_version) == ("running", "r1: no such file", None)

    assert BACK is not None
    going = watch(ours("r1", **BROKEN), ours("r2"), rollout=WAVES, then=[BACK])
    assert (going.progress, going.rollback_version) == ("running", 3)
    done = watch(back("r1"), back("r2"), rollout=WAVES, then=[BACK])
    assert (done.progress, done.ok, done.reason) == ("rolled_back", False, "r1: no such file")
    stuck = watch(back("r1"), back("r2", state="FAILED"), rollout=WAVES, then=[BACK])
    assert stuck.progress == "failed"


def test_statuses_may_tell_of_a_rollback_before_the_control_topic_does() -> None:
    assert watch(back("r1"), ours("r2"), rollout=WAVES).progress == "running"
    assert watch(back("r1"), back("r2"), rollout=WAVES).progress == "rolled_back"


def test_another_command_of_the_rollbacks_version_supersedes() -> None:
    other = a_status("r1", version=3, command_id="other")

    assert watch(other, ours("r2"), rollout=WAVES).progress == "superseded"
    assert BACK is not None
    assert watch(other, ours("r2"), rollout=WAVES, then=[BACK]).progress == "superseded"


def test_a_replica_that_died_in_its_turn_is_a_failure() -> None:
    died = ours("r1", state="LOADING", step="warm_up", turn=2)
    update = watch(died, a_status("r2", at=START + 20), now=START + 20, rollout=WAVES)

    assert update.reason == "r1: fell silent in step warm_up"
    assert [replica.replica for replica in update.replicas] == ["r2"]


def test_an_error_of_the_canary_in_its_soak_time_and_its_death_are_failures() -> None:
    soaks = Rollout(max_unavailable=1, canary=True, soak_s=60.0)
    fine = watch(ours("r1", served_s=3.0), a_status("r2"), rollout=soaks)
    assert (fine.progress, fine.reason) == ("running", None)
    erred = watch(ours("r1", served_s=9.0, first_error_s=4.0), a_status("r2"), rollout=soaks)
    assert erred.reason == "r1: a text got no vector 4 s after the new model began to serve"
    died = watch(ours("r1", served_s=9.0), a_status("r2", at=START + 20), now=START + 20, rollout=soaks)
    assert died.reason == "r1: fell silent in its soak time"


@pytest.mark.parametrize("soak", [-1, 1e9, float("nan"), True, "60"])
def test_what_is_no_soak_time_is_refused(soak: Any) -> None:
    with pytest.raises(InvalidArgument, match="soak"):
        checked_soak(soak, canary=True)


def test_a_soak_time_is_the_canarys() -> None:
    assert checked_soak(60, canary=True) == 60.0
    assert checked_soak(0, canary=False) is None
    with pytest.raises(InvalidArgument, match="without a canary"):
        checked_soak(60, canary=False)
    assert rollout_of(1, True, 3, 60.0) == Rollout(max_unavailable=1, canary=True, soak_s=60.0)


def test_a_failure_outside_a_turn_is_the_replicas_own() -> None:
    alone = ours("r1", state="FAILED", step="serving", error="no such directory")

    assert watch(alone, ours("r2"), rollout=WAVES).progress == "failed"


def test_the_rollback_is_written_by_the_watcher_if_no_replica_does() -> None:
    board = StatusBoard()
    command = a_command(2, path="/new", rollout=WAVES, fallback="/old")
    view = RolloutView(board, command, started=START, timeout=60.0)
    board.see("r1", ours("r1", **BROKEN))
    assert view.overdue_rollback(START) is None
    view.at(START)
    assert view.overdue_rollback(START + 9.9) is None
    due = view.overdue_rollback(START + 10)
    assert due is not None
    assert due == rollback_of(command, "r1: no such file")
    view.take(due)
    assert view.overdue_rollback(START + 20) is None


def test_with_nothing_to_go_back_to_a_failure_ends_the_watch_once_nobody_is_at_it() -> None:
    board = StatusBoard()
    view = RolloutView(board, a_command(2, rollout=WAVES), started=START, timeout=60.0)
    board.see("r1", ours("r1", **BROKEN))
    board.see("r2", ours("r2", state="LOADING", step="load", turn=2))
    assert view.at(START).progress == "running"
    board.see("r2", ours("r2"))
    board.see("r3", ours("r3", state="LOADING", step="validate"))
    update = view.at(START)
    assert (update.progress, update.reason, update.rollback_version) == ("failed", "r1: no such file", None)


def test_replicas_that_serve_different_models_are_told() -> None:
    one, other = ours("r1", model_version="sha256:1"), ours("r2", model_version="sha256:2")

    assert watch(one, other).mixed
    assert not watch(one, ours("r2", model_version="sha256:1")).mixed


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


def test_a_status_counts_under_the_key_of_its_replica_or_of_that_and_its_alias() -> None:
    record = encode_record(ours("r1"))

    assert read_status(b"r1", record) == ours("r1")
    assert read_status(b"r1/default", record) == ours("r1")
    for key in (None, b"r2", b"r1/other", b"r2/default", b"r1/", b"\xff"):
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
