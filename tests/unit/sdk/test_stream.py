"""A stream without a broker: its window, its batches, and every way in which it can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from embedq_sdk.embeddings import FinishedJob
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    InvalidArgument,
    KafkaUnavailable,
    TextTooLong,
)
from embedq_sdk.job_options import JobLimits, JobOptions, late
from embedq_sdk.stream import JobStream, StreamedJob, StreamOptions
from embedq_sdk.transport.job_runner import JobRunner
from embedq_sdk.transport.routing import Router
from embedq_shared.messages import Datum, ErrorBody
from embedq_shared.topics import Topics
from embedq_shared.weighted_semaphore import WeightedSemaphore
from tests.helpers.fake_service import OLD, Answer, FakeService, Received, changed, expected
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.support import wait_until

FOREVER = 3600.0
Source = Iterable[str] | AsyncIterable[str]


class Streams:
    """Streams of one runner on a fake transport."""

    def __init__(self, *limits: int) -> None:
        self.transport = FakeTransport()
        self.service: FakeService = self.transport.service
        self.in_flight = WeightedSemaphore(*limits)
        self.runner = JobRunner(self.transport, Router(Topics("t")), self.in_flight)
        self.transport.deliver = self.runner.deliver
        self.runner.open()

    def stream(self, *, max_job_bytes: int = 1000, **options: Any) -> JobStream:
        job_options = JobOptions(chunk=options.pop("chunk", None))
        window: dict[str, Any] = {
            "limits": JobLimits(max_job_bytes=max_job_bytes),
            "timeout": FOREVER,
            "batch_size": 2,
            "in_flight": 10,
            "flush_after": FOREVER,
        }
        return JobStream(self.runner, job_options, StreamOptions(**(window | options)))

    async def run(self, source: Source, **options: Any) -> list[StreamedJob]:
        async with aclosing(self.stream(**options).jobs(source)) as jobs:
            return [job async for job in jobs]

    def held(self) -> None:
        """Jobs are left unanswered until `release`."""
        self.service.behave = lambda job: None

    def release(self, *jobs: Received) -> None:
        for job in jobs or self.service.received:
            self.transport.reply(job, self.service.good(job))

    @property
    def sent(self) -> list[list[str]]:
        return [job.texts for job in self.service.received]

    @property
    def idle(self) -> bool:
        return self.runner.awaiting_reply == 0 and self.in_flight.held == (0, 0)


@pytest.fixture
async def streams() -> AsyncIterator[Streams]:
    """However a test leaves its stream, nothing is held in the end."""
    streams = Streams(100, 100_000)
    yield streams
    await wait_until(lambda: streams.idle, what="nothing held")


def texts_of(jobs: list[StreamedJob]) -> list[str]:
    return [text for job in jobs for text in job.inputs.texts]


# -- items ------------------------------------------------------------------------------------------------------------


async def test_every_text_comes_back_in_order_with_its_vector(streams: Streams) -> None:
    found = await streams.run(str(n) for n in range(7))
    items = [item for job in found for item in job.items()]

    assert [item.index for item in items] == list(range(7))
    assert [item.text for item in items] == [str(n) for n in range(7)]
    for item in items:
        assert item.vector is not None
        assert np.array_equal(item.vector, expected(item.text))
        assert (item.model_version, item.tokens, item.truncated, item.cached) == (OLD, 1, False, False)
    assert streams.sent == [["0", "1"], ["2", "3"], ["4", "5"], ["6"]]


async def test_a_job_that_failed_is_the_error_of_each_of_its_texts(streams: Streams) -> None:
    streams.service.behave = lambda job: [FakeService.failure(job, ErrorBody.of("text_too_long", "m"))]

    (job,) = await streams.run(["a", "b"])
    first, second = job.items()

    assert (first.index, first.text, second.index, second.text) == (0, "a", 1, "b")
    assert isinstance(first.error, TextTooLong)
    assert first.error is second.error
    assert first.vector is None


async def test_a_text_that_failed_alone_has_an_error_and_no_vector(streams: Streams) -> None:
    def second_fails(job: Received) -> list[Answer]:
        good = streams.service.good(job)
        bad = Datum(index=1, embedding=None, error=ErrorBody.of("text_too_long", "m", "input[1]"))
        return [changed(good, data=[good.data[0], bad])]

    streams.service.behave = second_fails
    (job,) = await streams.run(["a", "b"])
    first, second = job.items()

    assert first.error is None
    assert isinstance(second.error, TextTooLong)
    assert second.vector is None


async def test_late_chunks_are_items_of_their_own(streams: Streams) -> None:
    (job,) = await streams.run(["x" * 20, "y"], chunk=late(8))

    assert [(item.index, item.span) for item in job.items()] == [
        (0, (0, 8)),
        (0, (8, 16)),
        (0, (16, 20)),
        (1, (0, 1)),
    ]


# -- batches ----------------------------------------------------------------------------------------------------------


async def test_a_batch_is_cut_by_bytes_too(streams: Streams) -> None:
    await streams.run(["a" * 60, "b" * 60, "c" * 30], max_job_bytes=100, batch_size=10)

    assert streams.sent == [["a" * 60], ["b" * 60, "c" * 30]]


async def test_a_batch_is_never_larger_than_the_window(streams: Streams) -> None:
    await streams.run(["a", "b", "c"], batch_size=10, in_flight=2)

    assert streams.sent == [["a", "b"], ["c"]]


@pytest.mark.parametrize("ordered", [True, False])
async def test_an_incomplete_batch_is_sent_when_the_source_pauses(streams: Streams, ordered: bool) -> None:
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "first"
        await go_on.wait()
        yield "second"

    found = []
    async with aclosing(
        streams.stream(batch_size=100, flush_after=0.001, ordered=ordered).jobs(source())
    ) as jobs:
        async for job in jobs:
            found.append(job)
            go_on.set()

    assert streams.sent == [["first"], ["second"]]
    assert texts_of(found) == ["first", "second"]


async def test_a_fast_source_lets_other_tasks_run(streams: Streams) -> None:
    turns = 0
    ended = False

    async def other() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(other())
    streams.in_flight = WeightedSemaphore(10_000, 10_000)
    await streams.run((str(n) for n in range(90)), batch_size=90, in_flight=1000)
    ended = True
    await running

    assert turns > 1


# -- the window -------------------------------------------------------------------------------------------------------


class Counted:
    """An endless source that knows how much was pulled."""

    def __init__(self, size: int = 1) -> None:
        self.pulled = 0
        self._size = size

    def __iter__(self) -> Iterator[str]:
        while True:
            self.pulled += 1
            yield "x" * self._size


@pytest.mark.parametrize(
    ("size", "window", "pulled"),
    [
        (1, {"in_flight": 6}, 6),
        (100, {"in_flight": 1000, "in_flight_bytes": 500}, 5),
        (100, {"in_flight": 1000, "in_flight_bytes": 50}, 1),
    ],
)
async def test_the_source_is_not_touched_beyond_the_window(
    streams: Streams, size: int, window: dict[str, int], pulled: int
) -> None:
    source = Counted(size)
    streams.held()
    async with aclosing(streams.stream(batch_size=1, **window).jobs(source)) as jobs:
        taking = asyncio.ensure_future(anext(jobs))
        await wait_until(lambda: len(streams.sent) == pulled, what="a full window")
        assert source.pulled == pulled
        streams.release()
        await taking
        # Taken, but its taker has not come back for the next one: it still counts.
        assert source.pulled == pulled
        taking = asyncio.ensure_future(anext(jobs))
        await wait_until(lambda: len(streams.sent) == pulled + 1, what="one more")
        assert source.pulled == pulled + 1
        streams.release(streams.service.received[-1])
        await taking


async def test_a_slow_taker_holds_no_weight_of_the_client(streams: Streams) -> None:
    async with aclosing(streams.stream(in_flight=4).jobs(Counted())) as jobs:
        await anext(jobs)
        await wait_until(lambda: streams.idle, what="all jobs of the window answered")


async def test_a_stream_waits_for_the_client_to_have_room_and_sends_what_it_has() -> None:
    streams = Streams(3, 100_000)
    streams.held()
    async with aclosing(streams.stream(batch_size=2, in_flight=100).jobs(Counted())) as jobs:
        taking = asyncio.ensure_future(anext(jobs))
        await wait_until(lambda: len(streams.sent) == 2, what="as much as fits")
        assert [len(texts) for texts in streams.sent] == [2, 1]
        streams.release()
        streams.service.behave = None
        assert (await taking).first == 0
        assert (await anext(jobs)).first == 2
    await wait_until(lambda: streams.idle, what="nothing held")


async def test_without_order_a_slow_job_keeps_nobody_waiting(streams: Streams) -> None:
    streams.service.behave = lambda job: None if job.texts == ["0"] else [streams.service.good(job)]
    seen = []
    async with aclosing(streams.stream(batch_size=1, ordered=False).jobs(str(n) for n in range(5))) as jobs:
        async for job in jobs:
            seen.append(job.first)
            if len(seen) == 4:
                streams.release(streams.service.received[0])

    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[-1] == 0


async def test_with_order_a_job_that_ended_early_waits_for_those_before_it(streams: Streams) -> None:
    streams.held()
    running = asyncio.create_task(streams.run(["a", "b", "c"], batch_size=1))
    await wait_until(lambda: len(streams.sent) == 3, what="all jobs")
    first, second, third = streams.service.received
    for job in (third, first, second):
        streams.release(job)

    assert texts_of(await running) == ["a", "b", "c"]


# -- how it ends ------------------------------------------------------------------------------------------------------


async def test_an_empty_source_gives_nothing(streams: Streams) -> None:
    assert await streams.run([]) == []


@pytest.mark.parametrize("source", ["a string", b"bytes", 5, None])
async def test_what_is_no_source_is_refused(streams: Streams, source: Any) -> None:
    with pytest.raises(InvalidArgument, match="`texts`: expected an iterable of strings"):
        await streams.run(source)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_that_raises_does_so_after_what_it_gave(streams: Streams, ordered: bool) -> None:
    def broken() -> Iterator[str]:
        yield from ("a", "b")
        raise LookupError("the file ended")

    jobs = streams.stream(batch_size=1, ordered=ordered).jobs(broken())
    found = [await anext(jobs), await anext(jobs)]
    with pytest.raises(LookupError, match="the file ended"):
        await anext(jobs)

    assert sorted(texts_of(found)) == ["a", "b"]


async def test_a_text_that_no_job_can_carry_is_named_by_its_index(streams: Streams) -> None:
    with pytest.raises(InvalidArgument, match=r"`texts\[2\]`"):
        await streams.run(["a", "b", 5])  # type: ignore[list-item]


async def test_leaving_early_drops_what_is_under_way_and_what_waits(streams: Streams) -> None:
    source = Counted()
    streams.service.behave = lambda job: (
        [streams.service.good(job)] if job.seen and len(streams.sent) == 1 else None
    )
    async with aclosing(streams.stream(batch_size=3, in_flight=8).jobs(source)) as jobs:
        await anext(jobs)
        await wait_until(lambda: streams.in_flight.held[0] > 0, what="jobs under way")
    pulled = source.pulled
    await wait_until(lambda: streams.idle, what="nothing held")

    assert source.pulled == pulled


async def test_closing_the_client_ends_the_jobs_and_then_the_stream(streams: Streams) -> None:
    streams.held()
    running = asyncio.create_task(streams.run(["a", "b", "c", "d"], in_flight=4))
    await wait_until(lambda: len(streams.sent) == 2, what="both jobs")
    streams.runner.close()
    jobs = await running

    assert [type(job.outcome) for job in jobs] == [ClientClosed, ClientClosed]


async def test_closing_the_client_while_the_source_pauses_ends_the_stream(streams: Streams) -> None:
    """The source may never give another text, so the stream must not wait for one."""
    pulled = asyncio.Event()

    async def endless_pause() -> AsyncIterator[str]:
        pulled.set()
        yield "a"
        await asyncio.Event().wait()

    running = asyncio.create_task(streams.run(endless_pause(), batch_size=10, flush_after=0.01))
    await pulled.wait()
    streams.runner.close()

    async with asyncio.timeout(10):
        with pytest.raises(ClientClosed):
            await running


async def test_each_job_has_a_deadline_of_its_own(streams: Streams) -> None:
    streams.held()

    (job,) = await streams.run(["a"], timeout=0.01)

    assert isinstance(job.outcome, DeadlineExceeded)


async def test_an_error_that_is_not_the_sdks_is_raised(streams: Streams) -> None:
    streams.held()
    running = asyncio.create_task(streams.run(["a"]))
    await wait_until(lambda: bool(streams.transport.sent), what="the job")
    streams.transport.sent[0].fail(ZeroDivisionError("a bug"))

    with pytest.raises(ZeroDivisionError):
        await running


# -- all jobs at once -------------------------------------------------------------------------------------------------


async def test_collect_gives_all_jobs_in_order(streams: Streams) -> None:
    inputs, finished = await streams.stream().collect(["a", "b", "c"])

    assert [each.texts for each in inputs] == [["a", "b"], ["c"]]
    assert [job.count for job in finished] == [2, 1]
    assert all(isinstance(job, FinishedJob) and job.model_version == OLD for job in finished)


async def test_collect_of_nothing_is_an_error(streams: Streams) -> None:
    with pytest.raises(InvalidArgument, match="at least one text"):
        await streams.stream().collect([])


@pytest.mark.parametrize(
    "error",
    [ClientClosed(), KafkaUnavailable(servers="s", reason="r")],
    ids=lambda error: type(error).__name__,
)
async def test_collect_ends_at_the_first_job_that_says_all_will_fail(
    streams: Streams, error: EmbedError
) -> None:
    streams.held()
    collecting = asyncio.create_task(streams.stream().collect(str(n) for n in range(10)))
    await wait_until(lambda: bool(streams.transport.sent), what="the first job")
    streams.transport.sent[0].fail(error)

    with pytest.raises(type(error)):
        await collecting


@pytest.mark.parametrize("name", ["batch_size", "in_flight", "in_flight_bytes", "flush_after", "timeout"])
def test_a_number_that_is_not_positive_is_named(name: str) -> None:
    make: Callable[..., StreamOptions] = StreamOptions
    good: dict[str, Any] = {"limits": JobLimits(), "timeout": 1.0, "batch_size": 1, "in_flight": 1}
    with pytest.raises(InvalidArgument, match=f"`{name}`"):
        make(**(good | {name: 0}))
