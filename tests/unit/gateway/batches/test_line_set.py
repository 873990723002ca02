"""Sets of line numbers: what they hold, and that they stay small."""

from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.batches.line_set import LineSet

numbers = st.sets(st.integers(0, 200))


@given(st.lists(numbers))
def test_it_holds_what_was_put_in_and_nothing_else(parts: list[set[int]]) -> None:
    lines = LineSet()
    for part in parts:
        lines = lines.with_(part)
    every = set().union(*parts)
    assert list(lines) == sorted(every)
    assert len(lines) == len(every)
    assert [number in lines for number in range(-1, 203)] == [number in every for number in range(-1, 203)]


@given(numbers, numbers)
def test_its_ranges_are_in_order_and_do_not_touch(one: set[int], other: set[int]) -> None:
    ranges = LineSet().with_(one).with_(other).ranges
    for (start, end), (next_start, _) in pairwise(ranges):
        assert start < end < next_start


@given(numbers)
def test_it_is_written_and_read_again(some: set[int]) -> None:
    lines = LineSet().with_(some)
    assert msgspec.json.decode(msgspec.json.encode(lines), type=LineSet) == lines
