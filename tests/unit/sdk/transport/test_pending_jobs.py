"""The pure parts between a call and its reply: the reply book, back-off, shares of a batch, room."""

from __future__ import annotations

import asyncio

import pytest

from embedq_sdk.embeddings import ReadDatum, ReadError, ReadFailure, ReadResult
from embedq_sdk.errors import JobFailed, job_failed
from embedq_sdk.transport.job_sender import share
from embedq_sdk.transport.pending_jobs import PendingJob, PendingReplies, backoff, settle, worth_retrying


def a_call(correlation: bytes = b"1") -> PendingJob:
    future = asyncio.get_running_loop().create_future()
    return PendingJob(
        future, topic="t", value=b"", headers=[], correlation=correlation, count=1, size=1, timeout=1.0
    )


async def test_a_reply_is_for_the_call_of_its_correlation_id() -> None:
    book = PendingReplies()
    first, second = a_call(b"1"), a_call(b"2")
    book.open(first)
    book.open(second)

    assert book.find(b"2") is second
    assert book.unknown == 0


async def test_foreign_late_and_repeated_replies_are_counted_and_nothing_else() -> None:
    book = PendingReplies()
    call = a_call()
    book.open(call)
    call.future.set_result([])

    assert book.find(b"1") is None  # a repeat
    book.close(call)
    assert book.find(b"1") is None  # late
    assert book.find(b"other") is None
    assert book.find(None) is None
    assert book.unknown == 4
    assert len(book) == 0


async def test_a_failure_settles_a_call_with_its_error() -> None:
    outcome = settle(a_call(), ReadFailure(error=ReadError(code="unknown_model", message="m")))

    assert isinstance(outcome, JobFailed)
    assert not worth_retrying(outcome)


def test_only_errors_marked_retryable_are_worth_a_retry() -> None:
    busy = ReadError(code="overloaded", retryable=True)
    long = ReadError(code="text_too_long")

    def answer(error: ReadError | None) -> list[ReadResult]:
        data = [ReadDatum(index=0), ReadDatum(index=1, error=error)]
        return [ReadResult(id="a", model="m", model_version="v", dimensions=32, dtype="float32", data=data)]

    assert worth_retrying(job_failed(busy))
    assert not worth_retrying(job_failed(long))
    assert worth_retrying(answer(busy))
    assert not worth_retrying(answer(long))
    assert not worth_retrying(answer(None))


def test_backoff_doubles_up_to_a_limit_and_is_half_random() -> None:
    assert [backoff(n, lambda: 1.0) for n in range(4)] == [0.1, 0.2, 0.4, 0.8]
    assert backoff(0, lambda: 0.0) == 0.05
    assert backoff(10_000, lambda: 1.0) == 5.0


@pytest.mark.parametrize(
    ("waiting", "partitions", "each"), [(1, 8, 16), (1000, 8, 125), (129, 8, 17), (10, 1, 16)]
)
def test_a_burst_is_shared_among_all_partitions(waiting: int, partitions: int, each: int) -> None:
    assert share(waiting, partitions) == each
