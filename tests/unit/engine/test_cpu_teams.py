"""How a micro-batch is divided among the threads of a CPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.kernels.cpu_teams import LEAST_TOKENS, dealt, teams_of

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=60).map(sorted)


@given(LENGTHS, st.integers(1, 4))
def test_every_text_is_in_one_share_and_each_share_is_sorted(lengths: list[int], teams: int) -> None:
    shares = dealt(range(len(lengths)), lengths.__getitem__, teams)
    assert sorted(text for share in shares for text in share) == [*range(len(lengths))]
    assert all(share == sorted(share) for share in shares)
    assert len(shares) in {1, teams}


@given(LENGTHS, st.integers(2, 4))
def test_no_team_waits_long_for_another_nor_runs_too_little(lengths: list[int], teams: int) -> None:
    shares = dealt(range(len(lengths)), lengths.__getitem__, teams)
    if len(shares) > 1:
        loads = [sum(lengths[text] for text in share) for share in shares]
        assert max(loads) <= 1.25 * sum(loads) / teams
        assert sum(loads) >= teams * LEAST_TOKENS


@pytest.mark.parametrize(
    ("lengths", "teams", "shares"),
    [
        ([128, 128], 2, [[1], [0]]),
        ([127, 128], 2, [[0, 1]]),  # too few tokens
        ([100, 100, 100, 100, 100, 100, 100], 2, [[0, 2, 4, 6], [1, 3, 5]]),
        ([300, 300, 300], 2, [[0, 1, 2]]),  # one team would wait as long again
        ([10, 10, 2_000], 2, [[0, 1, 2]]),  # all threads are for the long one
        ([500] * 4, 1, [[0, 1, 2, 3]]),
    ],
)
def test_texts_are_dealt_where_that_pays(lengths: list[int], teams: int, shares: list[list[int]]) -> None:
    assert dealt(range(len(lengths)), lengths.__getitem__, teams) == shares


@pytest.mark.parametrize(
    ("threads", "teams", "each"),
    [
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 1),
        (4, 4, 1),
        (5, 4, 1),
        (6, 3, 2),
        (7, 3, 2),
        (8, 4, 2),
        (10, 2, 5),
        (16, 4, 4),
    ],
)
def test_teams_leave_few_threads_over(threads: int, teams: int, each: int) -> None:
    assert teams_of(threads) == (teams, each)
