"""Groups keep the order, cover everything and stay below their limits."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.grouping import batched_by


@given(st.lists(st.integers(0, 20)), st.integers(1, 40), st.integers(1, 5))
def test_groups_cover_the_items_in_order_within_both_limits(
    weights: list[int], limit: int, most: int
) -> None:
    groups = list(batched_by(weights, lambda weight: weight, limit, most=most))

    assert [weight for group in groups for weight in group] == weights
    for group in groups:
        assert 1 <= len(group) <= most
        assert sum(group) <= limit or len(group) == 1


@given(st.lists(st.integers(0, 20)), st.integers(1, 40))
def test_no_group_ends_before_the_next_item_would_be_too_much(weights: list[int], limit: int) -> None:
    groups = list(batched_by(weights, lambda weight: weight, limit))

    for group, following in itertools.pairwise(groups):
        assert sum(group) + following[0] > limit
