"""What a row holds, laid out without a device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine.prefix_cache import MARGIN
from embedq_consumer.engine.row import input_length, pack_prefixes, pack_row, positions_of, shared_length

Ids = npt.NDArray[np.int32]


@pytest.mark.parametrize("lengths", [[64], [1], [3, 1, 9], [4] * 15, [40, 24]])
def test_a_row_holds_its_sequences_and_a_tail_that_belongs_to_sequences_too(lengths: list[int]) -> None:
    size, slots = 64, 16
    texts = [np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(lengths)]
    row = np.full(input_length(size, slots), -1, dtype=np.int32)
    pack_row(row, texts, np.array(lengths, dtype=np.int32), size, slots)
    ids, positions, last, cu_seqlens = np.split(row, [size, 2 * size, 2 * size + slots])
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == size
    assert (np.diff(cu_seqlens) >= 0).all()
    for i, text in enumerate(texts):
        assert (ids[cu_seqlens[i] : cu_seqlens[i + 1]] == text).all()
        assert (positions[cu_seqlens[i] : cu_seqlens[i + 1]] == np.arange(len(text))).all()
        assert ids[last[i]] == text[-1]
    assert not ids[sum(lengths) :].any()
    assert not positions[sum(lengths) :].any()


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=6), st.sampled_from([None, 0, 1])
)
def test_positions_are_those_that_transformers_counts_for_each_text_alone(
    texts: list[list[int]], padding: int | None
) -> None:
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    wanted: list[int] = []
    for text in texts:
        if padding is None:
            wanted += range(len(text))
        else:
            counts = [token != padding for token in text]
            wanted += [sum(counts[: n + 1]) * count for n, count in enumerate(counts)]
    found = positions_of(ids, lengths, padding)
    assert found.dtype == np.int32
    assert found.tolist() == wanted


TEXTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=12)


def laid_out(texts: list[tuple[int, int]], saved_rows: Ids | None) -> tuple[Ids, list[Ids], Ids, int]:
    """(inputs, prefixes, lengths, size) of a part of texts, (own tokens, tokens of the prefix) each."""
    lengths = np.array([own for own, _ in texts], dtype=np.int32)
    size, slots = -(-int(lengths.sum()) // 16) * 16, 16
    random = np.random.default_rng(0)
    prefixes = [random.integers(0, 500, n).astype(np.int32) for _, n in texts]
    room = 4 * size + 128 + MARGIN
    inputs = np.full(shared_length(size, slots, room), -7, dtype=np.int32)
    whole = inputs[: input_length(size, slots)]
    pack_row(whole, [np.arange(n, dtype=np.int32) for n in lengths.tolist()], lengths, size, slots)
    used = pack_prefixes(inputs, prefixes, lengths, saved_rows, size, slots)
    assert (inputs[used:] == -7).all()
    return inputs, prefixes, lengths, size


@given(TEXTS, st.booleans())
def test_keys_of_each_text_are_contiguous_and_begin_with_its_prefix(
    texts: list[tuple[int, int]], saves: bool
) -> None:
    saved_rows = np.arange(900, 900 + texts[0][0], dtype=np.int32) if saves else None
    inputs, prefixes, lengths, size = laid_out(texts, saved_rows)
    positions, cu_seqlens = inputs[size : 2 * size], inputs[2 * size + 16 : 2 * size + 33]
    begin = -(-input_length(size, 16) // 16) * 16
    ends, count = inputs[begin : begin + 17], int(inputs[begin + 32])
    copies = inputs[begin + 48 : begin + 48 + 2 * count].reshape(-1, 2)
    targets = copies[:, 1].tolist()
    assert len(set(targets)) == len(targets)
    found = dict(zip(targets, copies[:, 0].tolist(), strict=True))
    for slot, (own, prefix) in enumerate(zip(lengths.tolist(), prefixes, strict=True)):
        wanted = [*(-1 - prefix).tolist(), *range(cu_seqlens[slot], cu_seqlens[slot] + own)]
        assert [found[row] for row in range(ends[slot], ends[slot + 1])] == wanted
        here = positions[cu_seqlens[slot] : cu_seqlens[slot + 1]]
        assert here.tolist() == list(range(len(prefix), len(prefix) + own))
    # The tail that no text uses has keys too, and after the last of all comes the pool's row of zeros.
    assert ends[-1] == size + sum(map(len, prefixes))
    assert (np.diff(ends) >= 0).all()
    for slot in range(len(texts), 16):
        assert [found[row] for row in range(ends[slot], ends[slot + 1])] == list(
            range(cu_seqlens[slot], cu_seqlens[slot + 1])
        )
    assert all(found[row] == -1 for row in range(ends[-1], ends[-1] + MARGIN))
    stored = {-1 - target: source for target, source in found.items() if target < 0}
    assert stored == ({900 + n: n for n in range(texts[0][0])} if saves else {})
