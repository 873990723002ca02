"""A batch's states: which follow which, what is counted, and who may change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedq_gateway.batches.batch import (
    ENDED,
    Batch,
    FileFault,
    LeaseLost,
    Piece,
    Segment,
    Status,
    WrongStatus,
)
from embedq_gateway.batches.identities import new_id
from embedq_gateway.batches.shapes import batch_object

NOW = 1_800_000_000
WINDOW = 86_400
FAULT = FileFault(code="empty_file", message="expected at least one request")


def a_batch() -> Batch:
    return Batch(
        id=new_id("batch", NOW),
        owner="anna",
        endpoint="/v1/embeddings",
        input_file_id=new_id("file", NOW),
        completion_window="24h",
        created_at=NOW,
        expires_at=NOW + WINDOW,
    )


def seen(batch: Batch) -> dict[str, Any]:
    """As its owner sees it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(batch_object(batch)))
    return found


def segment(*lines: int, name: str = "s", unrun: bool = False) -> Segment:
    if unrun:
        return Segment(lines=lines, failures=Piece(f"{name}.errors", 9), failed=len(lines), unrun=len(lines))
    return Segment(
        lines=lines,
        output=Piece(f"{name}.output", 9),
        completed=len(lines),
        tokens=5,
        model_versions={"v": 1},
    )


def test_a_batch_that_goes_well() -> None:
    batch = a_batch().validated(2, NOW + 1).advanced(segment(0, 1)).finalizing(NOW + 2).end(NOW + 3)
    shown = seen(batch)
    assert batch.status == "completed"
    assert batch.output_file_id is not None
    assert shown["error_file_id"] is None
    assert shown["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert (shown["in_progress_at"], shown["finalizing_at"], shown["completed_at"]) == (
        NOW + 1,
        NOW + 2,
        NOW + 3,
    )
    assert shown["usage"]["total_tokens"] == 5


def test_a_file_that_is_refused_says_why() -> None:
    shown = seen(a_batch().refused([FAULT], NOW))
    assert shown["status"] == "failed"
    assert shown["errors"] == {
        "object": "list",
        "data": [{"code": "empty_file", "message": FAULT.message, "param": None, "line": None}],
    }


def test_lines_that_were_not_run_in_time_make_it_expired() -> None:
    batch = a_batch().validated(2, NOW).advanced(segment(0))
    with pytest.raises(WrongStatus):
        batch.finalizing(NOW + 10)
    over = batch.finalizing(NOW + WINDOW)
    assert over.unfinished == "batch_expired"
    assert over.advanced(segment(1, name="rest", unrun=True)).end(NOW + WINDOW).status == "expired"


def test_a_batch_that_was_done_at_the_last_moment_is_completed() -> None:
    batch = a_batch().validated(1, NOW).advanced(segment(0)).finalizing(NOW + WINDOW + 5)
    assert batch.end(NOW + WINDOW + 6).status == "completed"


def test_a_cancelled_batch_keeps_what_is_done() -> None:
    batch = a_batch().validated(2, NOW).advanced(segment(0)).cancel(NOW + 5)
    assert batch.status == "cancelling"
    assert batch.cancel(NOW + 6) == batch
    assert batch.unfinished == "batch_cancelled"
    ended = batch.advanced(segment(1, name="rest", unrun=True)).end(NOW + 7)
    assert (ended.status, ended.completed, ended.failed) == ("cancelled", 1, 1)
    assert ended.output_file_id is not None
    assert ended.error_file_id is not None


@pytest.mark.parametrize(
    "status", sorted(set(get_args(Status)) - {"validating", "in_progress", "cancelling", "cancelled"})
)
def test_what_has_ended_or_is_about_to_cannot_be_cancelled(status: Status) -> None:
    with pytest.raises(WrongStatus, match=status):
        msgspec.structs.replace(a_batch(), status=status).cancel(NOW)


def test_the_same_segment_counts_once() -> None:
    """The storage may have done what it was asked, and its answer was lost."""
    batch = a_batch().validated(3, NOW).advanced(segment(0, 1))
    assert batch.advanced(segment(0, 1)) == batch


def test_a_line_is_finished_once() -> None:
    batch = a_batch().validated(3, NOW).advanced(segment(0, 1))
    with pytest.raises(RuntimeError, match="bug"):
        batch.advanced(segment(1, 2, name="another"))


def test_only_the_holder_of_the_lease_gives_signs_of_life() -> None:
    mine = a_batch().claimed("me")
    assert mine.beaten("me").lease != mine.lease
    with pytest.raises(LeaseLost):
        mine.beaten("you")
    with pytest.raises(LeaseLost):
        mine.claimed("you").beaten("me")
    assert mine.released("me").lease is None
    with pytest.raises(LeaseLost):
        mine.released("me").beaten("me")


@given(st.integers(1, 40), st.data())
def test_a_document_is_written_and_read_again(total: int, data: st.DataObject) -> None:
    lines = data.draw(st.sets(st.integers(0, total - 1)))
    batch = a_batch().validated(total, NOW).claimed("me").advanced(segment(*sorted(lines)))
    assert msgspec.json.decode(msgspec.json.encode(batch), type=Batch) == batch


class AnyOrder(RuleBasedStateMachine):
    """Whatever is tried in whatever order: lines are counted once, and what has ended stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = a_batch()
        self.now = NOW
        self.pieces = 0

    def attempt(self, change: Callable[[], Batch]) -> None:
        before = self.batch
        try:
            self.batch = change()
        except WrongStatus:
            assert self.batch == before
        else:
            assert not before.ended or self.batch == before

    @rule(seconds=st.sampled_from([1, 3600, WINDOW]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(total=st.integers(1, 6))
    def validate(self, total: int) -> None:
        self.attempt(lambda: self.batch.validated(total, self.now))

    @rule()
    def refuse(self) -> None:
        self.attempt(lambda: self.batch.refused([FAULT], self.now))

    @rule()
    def cancel(self) -> None:
        self.attempt(lambda: self.batch.cancel(self.now))

    @rule()
    def finalize(self) -> None:
        self.attempt(lambda: self.batch.finalizing(self.now))

    @precondition(lambda self: len(self.batch.done) == self.batch.total)
    @rule()
    def end(self) -> None:
        self.attempt(lambda: self.batch.end(self.now))

    @precondition(lambda self: len(self.batch.done) < self.batch.total)
    @rule(data=st.data(), unrun=st.booleans())
    def advance(self, data: st.DataObject, unrun: bool) -> None:
        left = [n for n in range(self.batch.total) if n not in self.batch.done]
        lines = data.draw(st.sets(st.sampled_from(left), min_size=1))
        self.pieces += 1
        done = segment(*sorted(lines), name=str(self.pieces), unrun=unrun)
        self.attempt(lambda: self.batch.advanced(done))

    @invariant()
    def every_line_counts_once(self) -> None:
        batch = self.batch
        assert batch.completed + batch.failed == len(batch.done) <= batch.total
        assert batch.unrun <= batch.failed

    @invariant()
    def what_is_shown_is_what_happened(self) -> None:
        shown = seen(self.batch)
        times = {status: shown.get(f"{status}_at") for status in get_args(Status) if status != "validating"}
        assert self.batch.status == "validating" or times[self.batch.status] is not None
        assert sum(times[status] is not None for status in ENDED) == self.batch.ended
        if self.batch.status in ("completed", "expired", "cancelled"):
            assert len(self.batch.done) == self.batch.total
        if self.batch.status == "completed":
            assert self.batch.unrun == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
