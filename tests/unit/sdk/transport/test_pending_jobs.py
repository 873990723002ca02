"""The pure parts between a job and its outcome: who claims a reply, what it means, back-off, shares of a batch."""

from __future__ import annotations

import asyncio
import gc

import pytest

from embedq_sdk.embeddings import ReadDatum, ReadError, ReadFailure, ReadResult, job_failed
from embedq_sdk.errors import ClientClosed, JobFailed
from embedq_sdk.transport.job_sender import share
from embedq_sdk.transport.pending_jobs import PendingJob, PendingReplies, retry_pause, settle, worth_retrying
from tests.helpers.replies import datum, result


def a_job(correlation: bytes = b"1", *, count: int = 1) -> PendingJob:
    future = asyncio.get_running_loop().create_future()
    return PendingJob(
        future, topic="t", value=b"", headers=[], correlation=correlation, count=count, size=1, timeout=1.0
    )


async def test_a_reply_is_for_the_job_of_its_correlation_id() -> None:
    replies = PendingReplies()
    first, second = a_job(b"1"), a_job(b"2")
    replies.add(first)
    replies.add(second)

    assert replies.claim(b"2") is second
    assert replies.unclaimed == 0


async def test_foreign_late_and_repeated_replies_are_counted_and_nothing_else() -> None:
    replies = PendingReplies()
    job = a_job()
    replies.add(job)
    job.future.set_result([])

    assert replies.claim(b"1") is None  # a repeat
    replies.remove(job)
    assert replies.claim(b"1") is None  # late
    assert replies.claim(b"other") is None
    assert replies.claim(None) is None
    assert replies.unclaimed == 4
    assert len(replies) == 0


async def test_a_failure_settles_a_job_with_its_error() -> None:
    outcome = settle(a_job(), ReadFailure(error=ReadError(code="unknown_model", message="m")))

    assert isinstance(outcome, JobFailed)
    assert not worth_retrying(outcome)


def test_only_errors_marked_retryable_are_worth_a_retry() -> None:
    busy = ReadError(code="overloaded", retryable=True)
    long = ReadError(code="text_too_long")

    def parts(error: ReadError | None) -> list[ReadResult]:
        return [result(datum(0), ReadDatum(index=1, error=error))]

    assert worth_retrying(job_failed(busy))
    assert not worth_retrying(job_failed(long))
    assert worth_retrying(parts(busy))
    assert not worth_retrying(parts(long))
    assert not worth_retrying(parts(None))


def test_the_pause_before_a_retry_grows_from_a_tenth_of_a_second_to_five() -> None:
    for attempt, longest in ((0, 0.1), (1, 0.2), (3, 0.8), (10, 5.0), (10_000, 5.0)):
        assert longest / 2 <= retry_pause(attempt) <= longest


@pytest.mark.parametrize(
    ("waiting", "partitions", "each"), [(1, 8, 16), (1000, 8, 125), (129, 8, 17), (10, 1, 16)]
)
def test_a_burst_is_shared_among_all_partitions(waiting: int, partitions: int, each: int) -> None:
    assert share(waiting, partitions) == each


# -- a job's end ------------------------------------------------------------------------------------------------------


async def test_a_job_ends_once() -> None:
    done, failed = a_job(), a_job()
    done.complete([])
    done.fail(ClientClosed())
    done.complete([result(datum())])
    failed.fail(ClientClosed())
    failed.complete([])

    assert await done.future == []
    with pytest.raises(ClientClosed):
        await failed.future


async def test_a_dropped_job_has_no_timer_and_nobody_waits_for_it() -> None:
    job = a_job()
    loop = asyncio.get_running_loop()
    job.deadline_timer = loop.call_later(60, job.fail, ClientClosed())
    job.retry_timer = loop.call_later(60, job.fail, ClientClosed())

    job.drop()

    assert job.future.cancelled()
    assert job.deadline_timer.cancelled()
    assert job.retry_timer.cancelled()
    job.drop()  # again


async def test_an_error_that_is_never_awaited_is_not_logged_after_drop() -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))

    dropped, kept = a_job(), a_job()
    for job in (dropped, kept):
        job.fail(ClientClosed())
    dropped.drop()
    del dropped, kept, job
    gc.collect()

    assert complaints == ["Future exception was never retrieved"]  # the one of `kept`


async def test_a_restarted_job_forgets_what_its_last_attempt_brought() -> None:
    job = a_job(count=2)
    job.acknowledged = True
    job.retry_timer = timer = asyncio.get_running_loop().call_later(60, job.fail, ClientClosed())
    assert settle(job, result(datum(0), part=0, parts=2)) is None

    job.restart()

    assert (job.attempt, job.acknowledged) == (1, False)
    assert timer.cancelled()
    assert settle(job, result(datum(1), part=1, parts=2)) is None
    whole = settle(job, result(datum(0), part=0, parts=2))
    assert isinstance(whole, list)
    assert [part.part for part in whole] == [0, 1]
