"""Which rows are embedded, and what a model that changes means. Pure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_batch.content.rows import RowId
from embedq_batch.manifest.plan import GONE, Done, Failed, Versions, Wanted, planned, verdict
from embedq_batch.manifest.store import State
from embedq_batch.running.options import RunOptions
from embedq_batch.running.run import begun


def wanted(**changes: Any) -> Wanted:
    return Wanted(**({"round": 2, "only_changed": False, "retry_errors": False} | changes))


@pytest.mark.parametrize(
    ("done", "failed", "asked", "said"),
    [
        (None, None, wanted(), "embed"),
        (Done(b"a", "v1", 2), None, wanted(), "done"),
        (Done(b"a", "v1", 2), None, wanted(version="v2"), "embed"),
        (Done(b"a", "v2", 2), None, wanted(version="v2"), "done"),
        (Done(b"b", "v1", 2), None, wanted(), "conflict"),
        (Done(b"b", "v1", 2), None, wanted(latest_wins=True), "embed"),
        (Done(b"a", "v1", 1), None, wanted(), "embed"),
        (Done(b"a", "v1", 1), None, wanted(only_changed=True), "done"),
        (Done(b"b", "v1", 1), None, wanted(only_changed=True), "embed"),
        (Done(b"a", "v1", 1), None, wanted(only_changed=True, version="v2"), "embed"),
        (None, Failed(b"a", 2), wanted(), "failed"),
        (None, Failed(b"a", 2), wanted(retry_errors=True), "embed"),
        (None, Failed(b"b", 2), wanted(), "embed"),
        (None, Failed(b"a", 1), wanted(), "embed"),
    ],
)
def test_a_row_is_embedded_or_not(done: Done | None, failed: Failed | None, asked: Wanted, said: str) -> None:
    assert verdict(b"a", done, failed, asked) == said


def test_of_a_row_that_is_under_way_the_manifest_does_not_know_yet() -> None:
    """A later change must not be taken for what the manifest has from before: the one under way would overwrite it."""
    known: dict[RowId, Done] = {"x": Done(b"2", "v1", 2)}
    plan = planned(["x"], [b"2"], (known, {}), wanted(latest_wins=True), {"x": b"1"})
    assert plan.embed == [0]
    plan = planned(["x"], [b"2"], (known, {}), wanted(latest_wins=True), {"x": GONE})
    assert plan.embed == [0]
    plan = planned(["x", "x"], [b"2", b"2"], ({}, {}), wanted(), {})
    assert (plan.embed, plan.done) == ([0], [1])
    plan = planned(["x", "x"], [b"1", b"2"], ({}, {}), wanted(), {})
    assert (plan.embed, plan.conflicts) == ([0], [1])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([b"1", b"2", b"3"])), max_size=12),
    st.integers(0, 12),
    st.booleans(),
)
def test_the_last_change_of_a_topic_is_in_the_store_wherever_the_run_was_killed(
    changes: list[tuple[str, bytes]], killed: int, recorded: bool
) -> None:
    """A model of a run over changes, cut off once: what was written may or may not be in the manifest; then all are read again."""
    store: dict[RowId, bytes] = {}
    manifest: dict[RowId, Done] = {}
    asked = wanted(latest_wins=True)
    for id, content in changes[:killed]:
        if planned([id], [content], (manifest, {}), asked, {}).embed:
            store[id] = content
            if recorded:
                manifest[id] = Done(content, "v1", 2)
    under_way: dict[RowId, bytes] = {}
    for id, content in changes:
        if planned([id], [content], (manifest, {}), asked, under_way).embed:
            under_way[id] = content
            store[id] = content

    assert store == dict(changes)


def test_a_change_of_the_model_means_what_was_asked_for() -> None:
    finish = Versions("finish", "v1")
    assert [finish.saw(version) for version in ("v1", "v2", "v1", "v2")] == ["go on"] * 4
    assert finish.newest == "v2"
    restart = Versions("restart", "v1")
    assert [restart.saw(version) for version in ("v1", "v2", "v2")] == ["go on", "restart", "go on"]
    stop = Versions("stop", "v1")
    assert [stop.saw(version) for version in ("v1", "v2")] == ["go on", "stop"]


def test_what_a_run_begins_with() -> None:
    fresh, complete = State(), State(round=1, complete=True)
    stopped = State(round=1, complete=False)
    first = begun(fresh, RunOptions(), 0)
    assert first is not None
    assert (first.round, first.complete, first.only_changed) == (1, False, False)
    assert begun(complete, RunOptions(), 3) is None
    assert begun(stopped, RunOptions(), 0) == stopped
    for options, round, only_changed in (
        (RunOptions(again=True), 2, False),
        (RunOptions(only_changed=True), 2, True),
        (RunOptions(delete_missing=True), 2, True),
        (RunOptions(retry_errors=True), 1, False),
    ):
        state = begun(complete, options, 3)
        assert state is not None
        assert (state.round, state.only_changed, state.complete) == (round, only_changed, False)
