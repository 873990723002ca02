"""When results are written down: not each by itself, and not too late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.batches.running.segment_buffer import FULL_BYTES, SegmentBuffer


def test_nothing_is_never_due() -> None:
    assert SegmentBuffer(0).due_in(1e6) is None


def test_a_result_waits_a_second_for_others() -> None:
    buffer = SegmentBuffer(0)
    buffer.add(0, b"x", "output", now=10)
    buffer.add(1, b"x", "output", now=10.9)
    assert buffer.due_in(10.4) == pytest.approx(0.6)


def test_late_in_a_long_batch_results_wait_longer_so_that_segments_stay_few() -> None:
    buffer = SegmentBuffer(0)
    buffer.add(0, b"x", "output", now=36_000)
    assert buffer.due_in(36_000) == pytest.approx(360)


def test_a_full_buffer_is_due_at_once() -> None:
    buffer = SegmentBuffer(0)
    buffer.add(0, b"x" * FULL_BYTES, "output", now=1e6)
    assert buffer.due_in(1e6) == 0


def test_a_day_of_results_makes_some_hundred_segments() -> None:
    now, segments = 0.0, 0
    while now < 86_400:
        buffer = SegmentBuffer(0)
        buffer.add(0, b"x", "output", now=now)
        now += buffer.due_in(now) or 0
        segments += 1
    assert segments < 800


@given(st.lists(st.tuples(st.sampled_from(["output", "failures"]), st.binary(max_size=4), st.booleans())))
def test_all_that_was_added_is_written_in_its_order(results: list[tuple[str, bytes, bool]]) -> None:
    buffer = SegmentBuffer(0)
    for number, (file, line, unrun) in enumerate(results):
        version = "v" if file == "output" else None
        buffer.add(number, line, file, 0, tokens=2, model_version=version, unrun=unrun)  # type: ignore[arg-type]
    written = buffer.written()
    assert written.lines == tuple(range(len(results)))
    assert written.output == b"".join(line for file, line, _ in results if file == "output")
    assert written.failures == b"".join(line for file, line, _ in results if file == "failures")
    assert written.completed + written.failed == len(results) == len(buffer)
    assert written.unrun == sum(unrun for _, _, unrun in results)
    assert written.tokens == 2 * len(results)
    assert written.model_versions == ({"v": written.completed} if written.completed else {})
