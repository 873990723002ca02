"""Which prefixes are cached, and in which rows of the pool."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine import Tokens
from embedq_consumer.engine.prefix_cache import PrefixCache

Ids = npt.NDArray[np.int32]


def ids_of(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int32)


def text_of(prefix: Ids, own: int = 3) -> Tokens:
    return Tokens(np.concatenate([prefix, np.arange(own, dtype=np.int32)]), shared=len(prefix))


def prefix_of(number: int, length: int = 10) -> Ids:
    return np.full(length, number, dtype=np.int32)


def test_a_prefix_is_computed_once_two_texts_have_come_with_it() -> None:
    pool = PrefixCache(64)
    assert pool.assign([text_of(prefix_of(1))]) == ([None], [])
    rows, new = pool.assign([text_of(prefix_of(1))])
    assert [prefix.ids.tolist() for prefix in new] == [prefix_of(1).tolist()]
    assert rows[0] is not None
    assert rows[0].tolist() == new[0].rows.tolist()
    rows, new = pool.assign([text_of(prefix_of(1)), Tokens(ids_of(1, 2)), text_of(prefix_of(2))])
    assert new == []
    assert [found is None for found in rows] == [False, True, True]
    rows, new = pool.assign([text_of(prefix_of(3))] * 2)
    assert len(new) == 1
    assert all(found is not None for found in rows)


def test_the_least_recently_used_prefix_is_evicted() -> None:
    pool = PrefixCache(31)
    for number in (1, 2, 3):
        pool.assign([text_of(prefix_of(number))] * 2)
    pool.assign([text_of(prefix_of(1))])
    _, new = pool.assign([text_of(prefix_of(4))] * 2)
    assert len(new) == 1
    cached = [pool.assign([text_of(prefix_of(number))])[0][0] is not None for number in (1, 3, 4)]
    assert cached == [True, True, True]
    # 2 is gone; it was worth computing before, and has to show that it still is.
    assert pool.assign([text_of(prefix_of(2))])[0] == [None]


def test_a_prefix_that_does_not_fit_with_the_others_of_its_batch_is_not_shared() -> None:
    pool = PrefixCache(26)
    pool.assign([text_of(prefix_of(9))] * 2)
    batch = [text_of(prefix_of(number)) for number in (9, 1, 2) for _ in range(2)]
    rows, new = pool.assign(batch)
    assert [found is None for found in rows] == [False, False, False, False, True, True]
    assert len(new) == 1


def test_a_prefix_that_could_not_be_computed_leaves_its_rows() -> None:
    pool = PrefixCache(11)
    for _ in range(3):
        _, new = pool.assign([text_of(prefix_of(1))] * 2)
        assert len(new) == 1
        pool.forget(new[0])


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=12), max_size=30))
def test_no_two_cached_prefixes_have_a_row_in_common(batches: list[list[tuple[int, int]]]) -> None:
    pool = PrefixCache(40)
    rows_of: dict[bytes, list[int]] = {}
    for batch in batches:
        texts = [text_of(prefix_of(number, length)) for number, length in batch]
        rows, new = pool.assign(texts)
        computed = {prefix.ids.tobytes(): prefix.rows.tolist() for prefix in new}
        used: dict[bytes, list[int]] = {}
        for text, own in zip(texts, rows, strict=True):
            if own is not None:
                key = text.ids[: text.shared].tobytes()
                assert len(own) == text.shared
                # What is read was computed just now, or by an earlier batch and not overwritten since.
                assert own.tolist() == computed.get(key, rows_of.get(key))
                used[key] = own.tolist()
        assert computed.keys() <= used.keys()
        assert all(0 < row < 40 for rows in used.values() for row in rows)
        taken = [row for rows in used.values() for row in rows]
        assert len(set(taken)) == len(taken)
        written = {row for rows in computed.values() for row in rows}
        rows_of = {key: rows for key, rows in rows_of.items() if not written & set(rows)} | computed
