"""What is asked again, for how long, and what becomes of a row that will never have a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from embedq_batch.content.rows import Problem, RowBatch
from embedq_batch.running.embedding import MOST_ATTEMPTS, Embedder
from embedq_sdk import (
    DeadlineExceeded,
    EmbedError,
    Expired,
    InternalError,
    JobFailed,
    KafkaRefused,
    KafkaUnavailable,
    ServiceOverloaded,
    TopicMissing,
    UnreadableReply,
)
from embedq_sdk.embeddings import FinishedJob, ReadDatum, ReadError, ReadResult
from embedq_sdk.job_options import JobOptions
from embedq_shared.messages import Timings

AWAY = KafkaUnavailable(servers="kafka:9092", reason="gone")


def failed(kind: type[JobFailed], code: str, *, retryable: bool) -> JobFailed:
    return kind(code=code, message="m", param=None, retryable=retryable)


def good(texts: Sequence[str]) -> list[ReadResult]:
    data = [ReadDatum(index=n, embedding=bytes(4 * 32), tokens=1, cached=n == 0) for n in range(len(texts))]
    return [ReadResult(id="1", model="m", model_version="v", dimensions=32, dtype="float32", data=data)]


class Scripted:
    """A client whose answers are given by a function of the call's number and its texts."""

    def __init__(self, answer: Callable[[int, Sequence[str]], Any]) -> None:
        self._answer = answer
        self.asked: list[list[str]] = []

    async def embed_raw(
        self, texts: Sequence[str], options: JobOptions, *, timeout: float, max_attempts: int
    ) -> list[FinishedJob]:
        assert max_attempts == 1
        assert options.lane == "bulk"
        assert timeout == 86_400
        self.asked.append(list(texts))
        outcome = self._answer(len(self.asked), texts)
        if isinstance(outcome, EmbedError) and not isinstance(outcome, JobFailed):
            raise outcome
        return [FinishedJob(count=len(texts), outcome=outcome)]


def embedder(client: Scripted, said: list[str | None] | None = None) -> Embedder:
    waits = said.append if said is not None else lambda reason: None
    return Embedder(client, JobOptions(lane="bulk"), waits, pause=lambda attempt: 0.0)


ROWS = RowBatch(ids=["a", "b", "c"], texts=["one", "two", "three"])


@pytest.mark.parametrize(
    "error",
    [
        AWAY,
        DeadlineExceeded(timeout=1, progress="p"),
        TopicMissing(servers="s", topic="t"),
        failed(ServiceOverloaded, "overloaded", retryable=True),
        failed(Expired, "expired", retryable=False),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_who_has_no_time_is_asked_until_they_have(error: EmbedError) -> None:
    said: list[str | None] = []
    client = Scripted(lambda call, texts: good(texts) if call > 20 else error)

    answered = await embedder(client, said).embed(ROWS)

    assert not answered.problems
    assert (len(client.asked), answered.tokens, answered.cached) == (21, 3, 1)
    assert said == [str(error)] * 20 + [None]


@pytest.mark.parametrize(
    ("said", "taken"), [(0.25, 0.25), (None, 0.0), (-1.0, 0.0), (float("inf"), 0.0), (float("nan"), 0.0)]
)
async def test_what_rows_cost_is_what_the_service_says_as_far_as_that_is_a_time(
    said: float | None, taken: float
) -> None:
    def answer(call: int, texts: Sequence[str]) -> list[ReadResult]:
        return [msgspec.structs.replace(part, timings=Timings(device=said)) for part in good(texts)]

    assert (await embedder(Scripted(answer)).embed(ROWS)).device_s == taken


async def test_who_is_refused_is_not_kept_waiting() -> None:
    refused = KafkaRefused(servers="kafka:9092", reason="no right")

    with pytest.raises(KafkaRefused):
        await embedder(Scripted(lambda call, texts: refused)).embed(ROWS)


@pytest.mark.parametrize(
    "error",
    [failed(InternalError, "internal", retryable=True), UnreadableReply(detail="d")],
    ids=["internal", "unreadable"],
)
async def test_a_job_that_may_heal_is_asked_some_times_and_then_each_row_alone(error: EmbedError) -> None:
    client = Scripted(lambda call, texts: error if "two" in texts else good(texts))

    answered = await embedder(client).embed(ROWS)

    assert list(answered.problems) == [1]
    assert [len(texts) for texts in client.asked] == [3] * MOST_ATTEMPTS + [1, 1, 1]


async def test_a_text_that_kills_processes_is_found_alone() -> None:
    crashed = failed(JobFailed, "crashed", retryable=False)
    client = Scripted(lambda call, texts: crashed if "two" in texts else good(texts))

    answered = await embedder(client).embed(ROWS)

    assert answered.problems == {1: Problem("crashed", "m")}
    assert client.asked == [["one", "two", "three"], ["one"], ["two"], ["three"]]
    assert sorted(row for group in answered.groups for row in group.rows) == [0, 2]


async def test_an_input_that_may_heal_is_asked_again_without_the_others() -> None:
    def answer(call: int, texts: Sequence[str]) -> list[ReadResult]:
        found = good(texts)
        if call == 1:
            error = ReadError(code="internal", message="m", retryable=True)
            found[0].data[1] = ReadDatum(index=1, error=error)
        return found

    client = Scripted(answer)
    answered = await embedder(client).embed(ROWS)

    assert client.asked == [["one", "two", "three"], ["two"]]
    assert not answered.problems
    assert sorted(id for group in answered.groups for id in group.vectors.ids) == ["a", "b", "c"]


async def test_rows_without_a_text_are_not_asked_for() -> None:
    problem = Problem("missing_text", "expected a text, got null")
    client = Scripted(lambda call, texts: good(texts))

    answered = await embedder(client).embed(RowBatch(ids=["a", "b"], texts=[problem, "two"]))
    nothing = await embedder(client).embed(RowBatch(ids=["a"], texts=[problem]))

    assert client.asked == [["two"]]
    assert answered.problems == nothing.problems == {0: problem}
    assert nothing.groups == []
