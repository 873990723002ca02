"""Cosines, percentiles and neighbour agreement, against the plainest way to compute them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embedq_consumer.verify import similarity as likeness

Vectors = npt.NDArray[np.float32]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Vectors, Vectors]:
    """Two models' vectors of the same texts, of any two lengths, some texts equal, many near each other."""
    texts = draw(st.integers(2, 12))
    components = st.integers(-3, 3).map(float)
    made = [
        draw(arrays.arrays(np.float32, (texts, draw(st.integers(1, 5))), elements=components))
        for _ in range(2)
    ]
    assume(all(vectors.any(axis=1).all() for vectors in made))
    return likeness.unit(made[0]), likeness.unit(made[1])


def plain_nearest(vectors: Vectors, text: int, k: int) -> list[int]:
    others = [other for other in range(len(vectors)) if other != text]
    products = vectors @ vectors.T
    return sorted(others, key=lambda other: (-float(products[text, other]), other))[:k]


@given(pairs(), st.integers(1, 11))
def test_neighbours_and_their_agreement_are_those_of_sorting_all_others(
    pair: tuple[Vectors, Vectors], k: int
) -> None:
    k = min(k, len(pair[0]) - 1)
    found = [likeness.nearest(vectors, k) for vectors in pair]
    plain = [[plain_nearest(vectors, n, k) for n in range(len(vectors))] for vectors in pair]
    assert [neighbours.tolist() for neighbours in found] == plain
    together, shares = likeness.agreements(*found)
    expected = [sum(n in theirs for n in ours) / k for ours, theirs in zip(*plain, strict=True)]
    assert shares.tolist() == expected
    assert together.k == k
    assert together.mean == pytest.approx(sum(expected) / len(expected))
    assert together.min == min(expected)
    assert together.unchanged == pytest.approx(sum(share == 1 for share in expected) / len(expected))


def test_neighbours_are_found_across_the_blocks_that_are_looked_at_together() -> None:
    random = np.random.default_rng(0)
    vectors = likeness.unit(random.standard_normal((1100, 16)).astype(np.float32))
    found = likeness.nearest(vectors, 10)
    for text in (0, 511, 512, 1023, 1024, 1099):
        assert set(found[text].tolist()) == set(plain_nearest(vectors, text, 10))
        assert text not in found[text]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=300), st.sampled_from([1, 5, 50, 99, 100]))
def test_a_percentile_is_the_least_value_that_enough_of_them_do_not_exceed(
    values: list[float], percent: int
) -> None:
    found = likeness.percentile(sorted(values), percent)
    enough = [v for v in values if sum(w <= v for w in values) * 100 >= percent * len(values)]
    assert found == min(enough)


@given(pairs(), st.floats(-1, 1))
def test_a_summary_holds_each_texts_cosine(pair: tuple[Vectors, Vectors], threshold: float) -> None:
    one = pair[0]
    other = pair[1] if pair[1].shape == one.shape else one[::-1]
    found = likeness.summary(one, other, threshold)
    plain = [
        sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) for x, y in zip(one, other, strict=True)
    ]
    assert found.min == pytest.approx(min(plain), abs=1e-6)
    assert found.mean == pytest.approx(sum(plain) / len(plain), abs=1e-6)
    assert found.p50 == pytest.approx(sorted(plain)[-(-len(plain) // 2) - 1], abs=1e-6)
    clear = [cosine for cosine in plain if abs(cosine - threshold) > 1e-6]
    below = sum(cosine < threshold for cosine in clear)
    assert below <= found.below_threshold * len(plain) + 1e-9
    assert found.below_threshold * len(plain) <= below + len(plain) - len(clear) + 1e-9
    apart = [
        abs(float(a) - float(b)) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert found.largest_difference == pytest.approx(max(apart), abs=1e-6)


def test_a_cut_is_normalized_again() -> None:
    vectors = likeness.unit(np.array([[3e30, 4e30, 7], [0, 1e-30, 1]], np.float32), 2)
    np.testing.assert_allclose(vectors, np.array([[0.6, 0.8], [0, 1]]), rtol=1e-6)
