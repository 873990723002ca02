"""How batches are cut into rows, and what a row holds: decided without a device."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.cuda_graphs import best_fit, fill, input_length, rooms_of, sizes_up_to


@given(st.lists(st.integers(1, 3000), max_size=300), st.integers(1, 40))
def test_every_sequence_is_in_one_part_and_parts_keep_their_bounds(lengths: list[int], most: int) -> None:
    parts = best_fit(lengths, 2048, most)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) <= most
        assert sum(lengths[index] for index in part) <= 2048 or len(part) == 1


def test_the_first_of_a_part_is_the_oldest_that_waits() -> None:
    lengths = np.random.default_rng(0).integers(1, 900, 500).tolist()
    taken: set[int] = set()
    for part in best_fit(lengths, 2048, 100):
        assert part[0] == min(set(range(500)) - taken)
        taken.update(part)


def test_documents_of_mixed_lengths_fill_rows_to_more_than_99_percent() -> None:
    lengths = (
        np.clip(np.random.default_rng(0).lognormal(np.log(180), 0.9, 3000), 8, 2048).astype(int).tolist()
    )
    parts = best_fit(lengths, 8192, 63)
    full = [sum(lengths[index] for index in part) for part in parts[:-1]]
    assert min(full) > 0.99 * 8192


def test_sizes_grow_by_at_most_a_quarter_from_1024_on() -> None:
    sizes = [size for size in sizes_up_to(16384) if size >= 1024]
    assert sizes[-1] == 16384
    assert all(later <= 1.25 * size for size, later in pairwise(sizes))
    assert all(rooms_of(size)[0] >= 16 for size in sizes_up_to(16384))


@pytest.mark.parametrize("lengths", [[64], [1], [3, 1, 9], [4] * 15, [40, 24]])
def test_a_row_holds_its_sequences_and_a_tail_that_belongs_to_sequences_too(lengths: list[int]) -> None:
    size, room = 64, 16
    texts = [np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(lengths)]
    row = np.full(input_length(size, room), -1, dtype=np.int32)
    fill(row, texts, np.array(lengths, dtype=np.int32), size, room)
    ids, positions, last, cu = np.split(row, [size, 2 * size, 2 * size + room])
    assert cu[0] == 0
    assert cu[-1] == size
    assert (np.diff(cu) >= 0).all()
    for i, text in enumerate(texts):
        assert (ids[cu[i] : cu[i + 1]] == text).all()
        assert (positions[cu[i] : cu[i + 1]] == np.arange(len(text))).all()
        assert ids[last[i]] == text[-1]
    assert not ids[sum(lengths) :].any()
    assert not positions[sum(lengths) :].any()
