"""Which prefixes texts share, when they pay, and in which rows of the pool they are."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq_consumer.engine import prefix_cache
from embedq_consumer.engine.prefix_cache import LONGEST_PREFIX, RUN_COST, ZEROS, Prefix, PrefixCache

Ids = npt.NDArray[np.int32]
Text = tuple[int, ...]


def ids_of(numbers: Sequence[int]) -> Ids:
    return np.array(numbers, dtype=np.int32)


def keys_of(ids: Ids) -> list[int]:
    """What a row of the pool holds of each token: it depends on the token and on all before it."""
    keys, key = [], 0
    for token in ids.tolist():
        key = hash((key, token))
        keys.append(key)
    return keys


def random_ids(count: int, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(3, 150_000, count).astype(np.int32)


def after(*prefixes: Ids, texts: int, own: int = 15, seed: int = 0) -> list[Ids]:
    """Texts that differ behind these beginnings, one after the other."""
    random = np.random.default_rng(seed)
    return [
        np.concatenate([*prefixes, random.integers(3, 150_000, own).astype(np.int32)]) for _ in range(texts)
    ]


def read_of(rows: Sequence[Ids | None]) -> list[int]:
    return [0 if found is None else len(found) for found in rows]


class Pool:
    """What the device would hold."""

    def __init__(self, rows: int) -> None:
        self.cache = PrefixCache(rows)
        self._rows: list[int | None] = [None] * rows

    def run(self, batch: Sequence[Ids]) -> tuple[list[int], list[Prefix], int]:
        """(tokens that each text reads, new prefixes, tokens that it all costs); each row read holds what it has to."""
        rows, new = self.cache.assign(batch)
        assert len(rows) == len(batch)
        cost = 0
        written: set[int] = set()
        for prefix in new:
            self.check(prefix.ids, prefix.read)
            assert len(prefix.read) + len(prefix.written) == len(prefix.ids) <= LONGEST_PREFIX
            cost += len(prefix.written) + RUN_COST
            for row, key in zip(
                prefix.written.tolist(), keys_of(prefix.ids)[len(prefix.read) :], strict=True
            ):
                assert row != ZEROS
                assert row not in written
                written.add(row)
                self._rows[row] = key
        for ids, found in zip(batch, rows, strict=True):
            if found is not None:
                assert 0 < len(found) < len(ids)
                self.check(ids, found)
        read = read_of(rows)
        return read, new, cost + sum(len(ids) - count for ids, count in zip(batch, read, strict=True))

    def check(self, ids: Ids, rows: Ids) -> None:
        assert [self._rows[row] for row in rows.tolist()] == keys_of(ids[: len(rows)])


# -- what is found -------------------------------------------------------------------------------------------------------


def test_instructions_that_differ_in_their_last_words_share_the_first_ones() -> None:
    common = random_ids(40, 1)
    texts = [after(common, random_ids(20, 100 + n), texts=1, own=40, seed=n)[0] for n in range(200)]
    read, new, cost = Pool(2048).run(texts)
    assert read == [40] * 200
    assert [len(prefix.ids) for prefix in new] == [40]
    assert cost == 200 * 60 + 40 + RUN_COST


def test_texts_of_few_tenants_share_each_tenants_words_as_well() -> None:
    common, tenants = random_ids(40, 1), [random_ids(20, 2), random_ids(20, 3)]
    texts = [text for n, tenant in enumerate(tenants) for text in after(common, tenant, texts=50, seed=n)]
    pool = Pool(2048)
    read, new, _ = pool.run(texts)
    assert read == [60] * 100
    # The first run computes the common tokens, too; the second reads them.
    assert [(len(prefix.read), len(prefix.written)) for prefix in new] == [(0, 60), (40, 20)]
    assert pool.run(texts)[:2] == (read, [])


def test_a_prefix_that_is_cached_serves_texts_that_have_less_in_common_with_it() -> None:
    common = random_ids(40, 1)
    pool = Pool(2048)
    assert pool.run(after(common, random_ids(20, 2), texts=50))[0] == [60] * 50
    read, new, _ = pool.run(after(common, random_ids(20, 3), texts=1))
    assert (read, new) == ([40], [])


def test_equal_texts_share_all_but_their_last_token() -> None:
    text = random_ids(100, 1)
    read, new, _ = Pool(2048).run([text] * 20)
    assert read == [99] * 20
    assert [len(prefix.ids) for prefix in new] == [99]


def test_nothing_longer_than_the_longest_prefix_is_shared() -> None:
    text = random_ids(3 * LONGEST_PREFIX, 1)
    assert Pool(2048).run([text] * 3)[0] == [LONGEST_PREFIX] * 3


def test_short_and_empty_texts_share_nothing() -> None:
    assert Pool(64).run([ids_of([]), ids_of([5]), *[ids_of(range(8))] * 2000])[0] == [0] * 2002


def test_what_is_cached_is_known_before_a_text_runs() -> None:
    common = random_ids(40, 1)
    cache = PrefixCache(2048)
    texts = after(common, texts=50)
    assert cache.known(texts[0]) == 0
    cache.assign(texts)
    assert [cache.known(ids) for ids in (texts[0], common, random_ids(50, 7), ids_of([]))] == [40, 39, 0, 0]
    # All of the common tokens but none of its own.
    assert cache.known(np.append(common, 5).astype(np.int32)) == 40


# -- when it pays --------------------------------------------------------------------------------------------------------


def test_a_prefix_is_computed_once_the_texts_that_came_would_have_saved_what_it_costs() -> None:
    pool, prefix = Pool(2048), random_ids(100, 1)
    batches = [pool.run(after(prefix, texts=1, seed=n)) for n in range(6)]
    # The fourth text is the first that makes three times 100 tokens more than 256.
    assert [len(new) for _, new, _ in batches] == [0, 0, 0, 1, 0, 0]
    assert [read for read, _, _ in batches] == [[0], [0], [0], [100], [100], [100]]


def test_a_batch_that_saves_too_little_shares_nothing() -> None:
    pool, prefix = Pool(2048), random_ids(10, 1)
    long = [random_ids(2000, n) for n in range(2, 30)]
    assert set(pool.run([*after(prefix, texts=30), *long])[0]) == {0}
    assert pool.run(after(prefix, texts=30, seed=1))[0] == [10] * 30


def test_a_prefix_that_has_still_to_pay_does_not_displace_one_in_use() -> None:
    pool = Pool(150)
    old, rare = random_ids(100, 1), random_ids(100, 2)
    pool.run(after(old, texts=10))
    for n in range(20):
        assert pool.run(after(old, texts=1, seed=n))[0] == [100]
        assert pool.run(after(rare, texts=1, seed=n))[0] == [0]
    # As many in one batch pay at once.
    assert pool.run(after(rare, texts=10))[0] == [100] * 10
    assert pool.cache.known(np.append(old, 5).astype(np.int32)) == 0


def test_the_least_recently_used_prefix_is_evicted() -> None:
    pool = Pool(301)
    prefixes = [random_ids(100, n) for n in range(4)]
    for prefix in prefixes[:3]:
        assert pool.run(after(prefix, texts=10))[0] == [100] * 10
    pool.run(after(prefixes[0], texts=1))
    assert pool.run(after(prefixes[3], texts=10))[0] == [100] * 10
    known = [pool.cache.known(np.append(prefix, 5).astype(np.int32)) for prefix in prefixes]
    assert known == [100, 0, 100, 100]


def test_what_does_not_fit_all_leaves_what_saves_most() -> None:
    common = random_ids(40, 1)
    tenants = [random_ids(30, 10 + n) for n in range(5)]
    texts = [text for n, tenant in enumerate(tenants) for text in after(common, tenant, texts=20 + n, seed=n)]
    read, _, _ = Pool(40 + 2 * 30 + 10).run(texts)
    assert read == [40] * (20 + 21 + 22) + [70] * (23 + 24)


def test_a_prefix_that_could_not_be_computed_leaves_its_rows() -> None:
    cache = PrefixCache(161)
    common, tenants = random_ids(40, 1), [random_ids(60, 2), random_ids(60, 3)]
    texts = [text for n, tenant in enumerate(tenants) for text in after(common, tenant, texts=20, seed=n)]
    for _ in range(3):
        _, new = cache.assign(texts)
        assert [len(prefix.written) for prefix in new] == [100, 60]
        for prefix in new:
            cache.forget(prefix)
    _, new = cache.assign(texts)
    cache.forget(new[1])
    assert [cache.known(texts[0]), cache.known(texts[-1])] in ([100, 40], [40, 100])


def test_beginnings_that_never_come_again_are_forgotten() -> None:
    cache = PrefixCache(2048)
    common = random_ids(40, 1)
    cache.assign(after(common, texts=50))
    for n in range(40):
        cache.assign([random_ids(50, 1000 * n + m) for m in range(500)])
    assert cache._nodes <= 2 * 2048 + 2 * 500
    assert cache.known(np.append(common, 5).astype(np.int32)) == 40


# -- of whatever batches -------------------------------------------------------------------------------------------------

# Of few tokens, so that texts have much in common, and lengths on both sides of what pays.
TEXTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 40, 200])), max_size=4),
        st.integers(0, 9),
    ).map(lambda made: ids_of([n for token, times in made[0] for n in [token] * times] + [9] * made[1])),
    max_size=25,
)


@given(TEXTS)
def test_a_batch_by_itself_never_costs_more_than_without_sharing(batch: list[Ids]) -> None:
    _, _, cost = Pool(2048).run(batch)
    assert cost <= sum(map(len, batch))


@given(st.lists(TEXTS, max_size=12), st.sampled_from([9, 60, 300, 2048]))
def test_every_text_reads_its_own_beginning_whatever_came_before(batches: list[list[Ids]], rows: int) -> None:
    pool = Pool(rows)
    for batch in batches:
        known = [pool.cache.known(ids) for ids in batch]
        read, new, _ = pool.run(batch)
        if not new:
            assert all(count in (0, before) for count, before in zip(read, known, strict=True))


@given(st.lists(TEXTS, min_size=1, max_size=12))
def test_a_prefix_costs_no_more_than_what_texts_missed_without_it(batches: list[list[Ids]]) -> None:
    pool = Pool(1 << 14)
    spent = sum(pool.run(batch)[2] for batch in batches)
    whole = sum(len(ids) for batch in batches for ids in batch)
    assert spent <= 2 * whole


def cheapest(texts: list[Text], run_cost: int) -> int:
    """By trying every set of beginnings."""
    found = {text[:n] for text in texts for n in range(1, len(text))}
    # Only where texts part, or end, may another beginning be better than a shorter or longer one.
    ends = [
        begun
        for begun in found
        if len({text[: len(begun) + 1] for text in texts if text[: len(begun)] == begun}) > 1
        or any(text[:-1] == begun for text in texts)
    ]
    least = sum(map(len, texts))
    for count in range(1, len(ends) + 1):
        for chosen in combinations(ends, count):
            computed = {begun[:n] for begun in chosen for n in range(1, len(begun) + 1)}
            runs = sum(
                not any(other != begun and other[: len(begun)] == begun for other in chosen)
                for begun in chosen
            )
            # What is computed on the way to a chosen one can be read as well.
            own = sum(
                len(text) - max((n for n in range(len(text)) if text[:n] in computed), default=0)
                for text in texts
            )
            least = min(least, own + len(computed) + run_cost * runs)
    return least


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6).map(tuple), max_size=7), st.integers(0, 4)
)
def test_what_is_shared_is_what_saves_most(texts: list[Text], run_cost: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "RUN_COST", run_cost)
        patch.setattr(prefix_cache, "_LEAST", 1)
        patch.setattr(prefix_cache, "_LEAST_SAVED", 1 << 30)
        rows, new = PrefixCache(512).assign([ids_of(text) for text in texts])
    cost = sum(len(text) - read for text, read in zip(texts, read_of(rows), strict=True))
    cost += sum(len(prefix.written) + run_cost for prefix in new)
    assert cost == cheapest(texts, run_cost)


def test_a_cache_that_is_closed_leaves_nothing_to_the_garbage_collector() -> None:
    cache = PrefixCache(512)
    contract, clause = random_ids(40, 1), random_ids(20, 2)
    cache.assign([*after(contract, clause, texts=5), *after(contract, texts=5, seed=1)])

    def nodes() -> int:
        return sum(isinstance(each, prefix_cache._Node) for each in gc.get_objects())

    gc.collect()
    others = nodes() - cache._nodes - 1
    assert cache._nodes > 2
    gc.disable()
    try:
        cache.close()
        assert nodes() - others == 1, "the root alone"
        assert cache.known(contract) == 0
    finally:
        gc.enable()
