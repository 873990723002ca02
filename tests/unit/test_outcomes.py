"""From raw vectors to outcomes: finite, cut, of length 1, in the job's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer import outcomes
from embedq_consumer.engine import TextTooLong
from embedq_consumer.flights import Item, Waiter
from embedq_consumer.jobs import Answer, Outcome
from embedq_shared.messages import ErrorBody
from embedq_shared.vectors import dequantise
from tests.unit.in_flight import admitted, item


def outcomes_of(
    landed: Sequence[tuple[Item, list[Waiter]]], vectors: npt.NDArray[np.float32]
) -> list[Outcome]:
    """The outcomes alone, in order."""
    return [outcome for _, _, outcome in outcomes.outcomes_of(landed, vectors)]


def raw(rows: int, hidden: int = 256) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, hidden)).astype(np.float32) * 7


@pytest.mark.parametrize("dimensions", [32, 33, 256])
def test_a_vector_is_cut_and_then_has_length_1(dimensions: int) -> None:
    vectors = raw(1)
    [found] = outcomes_of([item(admitted(input="a", dimensions=dimensions))], vectors)
    assert isinstance(found, Answer)
    expected = vectors[0, :dimensions] / np.linalg.norm(vectors[0, :dimensions])
    np.testing.assert_allclose(dequantise(found.vector, "float32"), expected, atol=1e-6)
    assert (found.tokens, found.truncated, found.scale, found.cached) == (3, None, None, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 255])
def test_one_number_that_is_not_finite_costs_that_text_alone(bad: float, place: int) -> None:
    vectors = raw(3)
    vectors[1, place] = bad
    job = admitted(input=["a", "b", "c"], dimensions=32)
    first, second, third = outcomes_of([item(job, index) for index in range(3)], vectors)
    assert isinstance(first, Answer)
    assert isinstance(third, Answer)
    assert isinstance(second, ErrorBody)
    assert (second.code, second.param, second.retryable) == ("non_finite", "input[1]", False)


def test_texts_of_several_jobs_get_what_their_own_job_asks_for() -> None:
    vectors = raw(4)
    jobs = [
        admitted(input="a", dtype=dtype, dimensions=dimensions)
        for dtype, dimensions in (("float32", 64), ("float16", 32), ("int8", 128), ("binary", 256))
    ]
    found = outcomes_of([item(job) for job in jobs], vectors)
    assert [len(answer.vector) for answer in found if isinstance(answer, Answer)] == [256, 64, 128, 32]
    for job, vector, answer in zip(jobs, vectors, found, strict=True):
        assert isinstance(answer, Answer)
        unit = vector[: job.request.dimensions] / np.linalg.norm(vector[: job.request.dimensions])
        back = dequantise(answer.vector, job.request.dtype, answer.scale)
        expected = unit > 0 if job.request.dtype == "binary" else unit
        np.testing.assert_allclose(back, expected, atol=3e-3)
        assert (answer.scale is not None) is (job.request.dtype == "int8")


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_a_cut_text_says_at_which_end(truncate: str) -> None:
    job = admitted(input=["a", "b"], truncate=truncate)
    cut, whole = outcomes_of([item(job, 0, truncated=True), item(job, 1)], raw(2))
    assert isinstance(cut, Answer)
    assert isinstance(whole, Answer)
    assert (cut.truncated, whole.truncated) == (truncate, None)


def test_zeros_stay_zeros() -> None:
    [found] = outcomes_of([item(admitted(input="a", dimensions=32))], np.zeros((1, 256), np.float32))
    assert isinstance(found, Answer)
    assert not dequantise(found.vector, "float32").any()


def test_a_text_over_the_limit_is_told_the_limit_and_its_length() -> None:
    error = outcomes.too_long(admitted(input=["a", "b"]).request, 1, TextTooLong(tokens=700, limit=512))
    assert (error.code, error.param, error.retryable) == ("text_too_long", "input[1]", False)
    assert "512" in error.message
    assert "700" in error.message


def test_a_text_that_the_model_cannot_run_may_be_tried_again() -> None:
    error = outcomes.failed(admitted(input="a"), 0)
    assert (error.code, error.param, error.retryable) == ("internal", "input", True)


def test_a_deadline_that_passes_while_a_text_waits_is_not_worth_a_retry() -> None:
    assert (outcomes.EXPIRED_WAITING.code, outcomes.EXPIRED_WAITING.retryable) == ("expired", False)


def test_inputs_that_share_a_text_each_get_what_their_own_job_asks_for() -> None:
    small, large = (
        admitted(input="a", dimensions=32),
        admitted(input=["b", "a"], dimensions=64, dtype="float16"),
    )
    shared, _ = item(small)
    vectors = raw(1)
    found = outcomes.outcomes_of([(shared, [(small, 0), (large, 1)])], vectors)
    assert [(job, index) for job, index, _ in found] == [(small, 0), (large, 1)]
    assert [len(answer.vector) for _, _, answer in found if isinstance(answer, Answer)] == [32 * 4, 64 * 2]
    vectors[0, 200] = np.nan
    bad = outcomes.outcomes_of([(shared, [(small, 0), (large, 1)])], vectors)
    assert [error.param for _, _, error in bad if isinstance(error, ErrorBody)] == ["input", "input[1]"]
