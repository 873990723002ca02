"""Which rows there are, and how batches are cut into parts that fit one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.prefix_cache import MARGIN
from embedq_consumer.engine.row_sizes import RowSizes, best_fit, sizes_up_to, slots_for

PART_TOKENS = 2048


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
    assert all(slots_for(size)[0] >= 16 for size in sizes_up_to(16384))


@given(st.lists(st.tuples(st.integers(1, 900), st.sampled_from([0, 25, 300])), max_size=200))
def test_parts_keep_within_their_room_for_prefixes(texts: list[tuple[int, int]]) -> None:
    lengths, prefixes = [own for own, _ in texts], [prefix for _, prefix in texts]
    parts = best_fit(lengths, 2048, 40, prefixes=prefixes, prefix_room=1000)
    assert sorted(index for part in parts for index in part) == list(range(len(texts)))
    for part in parts:
        assert sum(prefixes[index] for index in part) <= 1000
        assert sum(lengths[index] for index in part) <= 2048


def test_a_row_fits_its_texts_and_an_unused_tail_takes_a_slot() -> None:
    sizes = RowSizes(4096, PART_TOKENS)
    assert sizes.fitting(16, 16, shared=False) == (16, 16)
    assert sizes.fitting(15, 15, shared=False) == (16, 16)
    assert sizes.fitting(15, 16, shared=False) is not None
    assert sizes.fitting(15, 16, shared=False) != (16, 16)
    assert sizes.fitting(1024, 600, shared=False) is None
    assert sizes.fitting(4097, 1, shared=False) is None


def test_the_largest_row_has_room_for_all_others() -> None:
    sizes = RowSizes(16384, 16384)
    size, slots = sizes.largest
    for shared in (False, True):
        rows = sizes.rows(shared=shared)
        assert rows == sorted(rows)
        assert max(tokens for tokens, _ in rows) <= size == 16384
        assert max(count for _, count in rows) <= slots


def test_rows_with_shared_prefixes_are_fewer_and_have_room_for_more_keys() -> None:
    sizes = RowSizes(16384, 16384)
    assert len(sizes.rows(shared=True)) < len(sizes.rows(shared=False)) / 3
    assert sizes.key_room == 4 * 16384 + MARGIN


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([0, 0, 30, 900])), max_size=150),
    st.booleans(),
    st.sampled_from([PART_TOKENS, 16384]),
)
def test_each_part_fits_a_row_or_is_one_long_text(
    texts: list[tuple[int, int]], deterministic: bool, limit: int
) -> None:
    sizes = RowSizes(limit, PART_TOKENS, deterministic=deterministic)
    lengths = [length for length, _ in texts]
    prefixes = [0 if deterministic else prefix for _, prefix in texts]
    parts = sizes.parts(lengths, prefixes)
    assert sorted(index for part in parts for index in part) == list(range(len(texts)))
    for part in parts:
        tokens = sum(lengths[index] for index in part)
        assert tokens <= sizes.part_tokens or len(part) == 1
        if tokens <= min(limit, sizes.part_tokens):
            shared = any(prefixes[index] for index in part)
            assert sizes.fitting(tokens, len(part), shared=shared) is not None


@given(st.integers(1, 5000))
def test_in_deterministic_mode_a_texts_row_depends_on_its_own_length_alone(length: int) -> None:
    sizes = RowSizes(16384, 16384, deterministic=True)
    alone = sizes.fitting(length, 1, shared=False)
    others = [200] * 50
    for part in sizes.parts([*others, length], [0] * 51):
        if 50 in part:
            tokens = sum([*others, length][index] for index in part)
            assert sizes.fitting(tokens, len(part), shared=False) == alone
            assert length <= 1024 or part == [50]


def test_a_batch_that_fits_one_row_is_one_part_and_none_is_no_part() -> None:
    sizes = RowSizes(16384, PART_TOKENS)
    assert sizes.parts([5, 7, 9], [0, 0, 0]) == [[0, 1, 2]]
    assert sizes.parts([], []) == []


@pytest.mark.parametrize(("size", "slots"), [(16, (16,)), (1024, (16, 32, 128)), (16384, (128, 512, 2048))])
def test_long_rows_have_more_slots(size: int, slots: tuple[int, ...]) -> None:
    assert slots_for(size) == slots
