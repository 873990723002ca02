"""The most dimensions that jobs named within an hour, against those of every job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.gates.dimensions import DimensionsInUse, check_dimensions


@given(st.lists(st.tuples(st.integers(32, 64), st.integers(0, 2000)), max_size=30), st.integers(0, 5000))
def test_it_is_the_most_of_all_jobs_of_the_last_hour(jobs: list[tuple[int, int]], later: int) -> None:
    in_use, now, asked = DimensionsInUse(), 0, []
    for dimensions, after in jobs:
        now += after
        in_use.note(dimensions, now)
        asked.append((dimensions, now))
    now += later
    assert in_use.most(now) == max((found for found, at in asked if now - at <= 3600), default=0)


@pytest.mark.parametrize(
    ("hidden_size", "least", "in_use"),
    [(None, 999, 999), (256, None, 0), (256, None, 256), (256, 256, 1024), (256, 1, 1024)],
)
def test_a_model_with_enough_of_them_may_serve(
    hidden_size: int | None, least: int | None, in_use: int
) -> None:
    check_dimensions(hidden_size, least, in_use)


def test_a_model_with_fewer_than_jobs_ask_for_is_refused_unless_the_command_says_that_they_do() -> None:
    with pytest.raises(ModelRejected, match=r"^dimensions: jobs of the last hour asked for 512, the model's"):
        check_dimensions(256, None, 512)
    with pytest.raises(
        ModelRejected, match=r"^min_dimensions: expected a hidden size of at least 512, got 256$"
    ):
        check_dimensions(256, 512, 0)
