"""From raw vectors to outcomes: finite, cut, of length 1, in the job's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.batching.single_flight import Identity, JobInput, QueuedText, Window
from embedq_consumer.batching.windows import WindowAssembler
from embedq_consumer.delivery import postprocess as outcomes
from embedq_consumer.engine import Chunked
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome, Spans
from embedq_shared.messages import ErrorBody
from embedq_shared.vectors import dequantize
from tests.helpers.in_flight import admitted, chunked, computed


def outcomes_of(
    texts: Sequence[tuple[QueuedText, list[JobInput]]], vectors: npt.NDArray[np.float32]
) -> list[Outcome]:
    """The outcomes alone, in order."""
    return [outcome for _, _, outcome in outcomes.outcomes_of(texts, vectors)]


def raw(rows: int, hidden: int = 256) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, hidden)).astype(np.float32) * 7


@pytest.mark.parametrize("dimensions", [32, 33, 256])
def test_a_vector_is_cut_and_then_has_length_1(dimensions: int) -> None:
    vectors = raw(1)
    [found] = outcomes_of([computed(admitted(input="a", dimensions=dimensions))], vectors)
    assert isinstance(found, InputVector)
    expected = vectors[0, :dimensions] / np.linalg.norm(vectors[0, :dimensions])
    np.testing.assert_allclose(dequantize(found.vector, "float32"), expected, atol=1e-6)
    assert (found.tokens, found.truncated, found.scale, found.cached) == (3, None, None, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 255])
def test_one_number_that_is_not_finite_costs_that_text_alone(bad: float, place: int) -> None:
    vectors = raw(3)
    vectors[1, place] = bad
    job = admitted(input=["a", "b", "c"], dimensions=32)
    first, second, third = outcomes_of([computed(job, index) for index in range(3)], vectors)
    assert isinstance(first, InputVector)
    assert isinstance(third, InputVector)
    assert isinstance(second, ErrorBody)
    assert (second.code, second.param, second.retryable) == ("non_finite", "input[1]", False)


def test_texts_of_several_jobs_get_what_their_own_job_asks_for() -> None:
    vectors = raw(4)
    jobs = [
        admitted(input="a", dtype=dtype, dimensions=dimensions)
        for dtype, dimensions in (("float32", 64), ("float16", 32), ("int8", 128), ("binary", 256))
    ]
    found = outcomes_of([computed(job) for job in jobs], vectors)
    assert [len(answer.vector) for answer in found if isinstance(answer, InputVector)] == [256, 64, 128, 32]
    for job, vector, answer in zip(jobs, vectors, found, strict=True):
        assert isinstance(answer, InputVector)
        unit = vector[: job.request.dimensions] / np.linalg.norm(vector[: job.request.dimensions])
        back = dequantize(answer.vector, job.request.dtype, answer.scale)
        expected = unit > 0 if job.request.dtype == "binary" else unit
        np.testing.assert_allclose(back, expected, atol=3e-3)
        assert (answer.scale is not None) is (job.request.dtype == "int8")


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_a_cut_text_says_at_which_end(truncate: str) -> None:
    job = admitted(input=["a", "b"], truncate=truncate)
    cut, whole = outcomes_of([computed(job, 0, truncated=True), computed(job, 1)], raw(2))
    assert isinstance(cut, InputVector)
    assert isinstance(whole, InputVector)
    assert (cut.truncated, whole.truncated) == (truncate, None)


def test_zeros_stay_zeros() -> None:
    [found] = outcomes_of([computed(admitted(input="a", dimensions=32))], np.zeros((1, 256), np.float32))
    assert isinstance(found, InputVector)
    assert not dequantize(found.vector, "float32").any()


def test_inputs_that_share_a_text_each_get_what_their_own_job_asks_for() -> None:
    small, large = (
        admitted(input="a", dimensions=32),
        admitted(input=["b", "a"], dimensions=64, dtype="float16"),
    )
    shared, _ = computed(small)
    vectors = raw(1)
    found = outcomes.outcomes_of([(shared, [(small, 0), (large, 1)])], vectors)
    assert [(job, index) for job, index, _ in found] == [(small, 0), (large, 1)]
    assert [len(answer.vector) for _, _, answer in found if isinstance(answer, InputVector)] == [
        32 * 4,
        64 * 2,
    ]
    vectors[0, 200] = np.nan
    bad = outcomes.outcomes_of([(shared, [(small, 0), (large, 1)])], vectors)
    assert [error.param for _, _, error in bad if isinstance(error, ErrorBody)] == ["input", "input[1]"]


# -- chunks -----------------------------------------------------------------------------------------------------------


def last_window(job: JobState, of: Chunked, index: int = 0) -> QueuedText:
    return QueuedText(
        identity=Identity.of(job, index), tokens=of.windows[0], arrived=0.0, window=Window(of, 0)
    )


def test_a_mean_is_that_of_the_windows_unit_vectors_by_their_tokens() -> None:
    of, vectors = chunked(100, 20, 1), raw(3)
    vectors[1] *= 50  # its length is no weight
    assembler = WindowAssembler(of, "mean", 256)
    assert [assembler.add(number, vectors[number : number + 1]) for number in (2, 0, 1)] == [
        False,
        False,
        True,
    ]
    job = admitted(input="a", dimensions=64, chunk={"mode": "mean"})
    [(_, _, found)] = outcomes.assembled_outcomes_of([(last_window(job, of), assembler.rows, [(job, 0)])])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = (units * np.array([[100], [20], [1]])).sum(axis=0)[:64]
    assert isinstance(found, InputVector)
    np.testing.assert_allclose(
        dequantize(found.vector, "float32"), expected / np.linalg.norm(expected), atol=1e-6
    )
    assert (found.tokens, found.truncated, found.cached) == (121 + 3 * 2, None, False)


def test_a_mean_over_one_window_is_the_texts_own_vector() -> None:
    of, vectors = chunked(5), raw(1)
    assembler = WindowAssembler(of, "mean", 256)
    assert assembler.add(0, vectors)
    job = admitted(input="a", chunk={"mode": "mean"})
    [(_, _, mean)] = outcomes.assembled_outcomes_of([(last_window(job, of), assembler.rows, [(job, 0)])])
    [plain] = outcomes_of([computed(admitted(input="a"))], vectors)
    assert isinstance(mean, InputVector)
    assert isinstance(plain, InputVector)
    np.testing.assert_allclose(
        dequantize(mean.vector, "float32"), dequantize(plain.vector, "float32"), atol=1e-6
    )


def test_each_span_is_cut_normalized_and_quantized_by_itself() -> None:
    of, vectors = chunked(4, 6), raw(2)
    small = admitted(input="a", dimensions=32, dtype="int8", chunk={"mode": "late"})
    large = admitted(input=["b", "a"], chunk={"mode": "late"})
    found = outcomes.assembled_outcomes_of([(last_window(small, of), vectors, [(small, 0), (large, 1)])])
    for job, _, spans in found:
        assert isinstance(spans, Spans)
        assert [(span.start, span.end, span.tokens) for span in spans.spans] == [(0, 4, 4), (4, 10, 6)]
        assert spans.tokens == 14
        for span, vector in zip(spans.spans, vectors, strict=True):
            cut = vector[: job.request.dimensions]
            back = dequantize(span.vector, job.request.dtype, span.scale)
            np.testing.assert_allclose(back, cut / np.linalg.norm(cut), atol=3e-3)


@pytest.mark.parametrize("mode", ["late", "mean"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_chunk_that_is_not_finite_costs_its_text_alone(bad: float, mode: Literal["late", "mean"]) -> None:
    of, vectors = chunked(4, 6), raw(2)
    job = admitted(input=["a", "b"], chunk={"mode": mode})
    rows = []
    for spoilt in (True, False):
        vectors[1, 7] = bad if spoilt else 1.0
        assembler = WindowAssembler(of, mode, 256)
        assembler.add(0, vectors[:1])
        assembler.add(1, vectors[1:])
        rows.append(assembler.rows)
    first, second = outcomes.assembled_outcomes_of(
        [(last_window(job, of), rows[0], [(job, 0)]), (last_window(job, of, 1), rows[1], [(job, 1)])]
    )
    assert isinstance(first[2], ErrorBody)
    assert (first[2].code, first[2].param) == ("non_finite", "input[0]")
    assert not isinstance(second[2], ErrorBody)


def test_a_text_that_ran_whole_is_not_assembled() -> None:
    text, waiters = computed(admitted(input="a"))
    with pytest.raises(RuntimeError, match="This is a bug"):
        outcomes.assembled_outcomes_of([(text, raw(1), waiters)])


def test_a_zero_window_adds_nothing_to_a_mean() -> None:
    assembler = WindowAssembler(chunked(4, 6), "mean", 256)
    vectors = raw(1)
    assembler.add(0, np.zeros((1, 256), np.float32))
    assembler.add(1, vectors)
    unit = vectors / np.linalg.norm(vectors)
    np.testing.assert_allclose(assembler.rows, unit * 0.6, atol=1e-6)
