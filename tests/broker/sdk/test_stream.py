"""embed_many and stream on a real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing

import numpy as np
import pytest

from embedq_sdk import (
    ClientClosed,
    DeadlineExceeded,
    EmbedClient,
    InvalidArgument,
    JobFailed,
    PartialFailure,
    TextTooLong,
)
from embedq_shared.messages import Datum, ErrorBody
from tests.helpers.fake_service import NEW, OLD, Answer, Received, changed, expected, rows
from tests.helpers.responder import Responder
from tests.helpers.support import patient, wait_until

pytestmark = pytest.mark.kafka

Clients = Callable[..., EmbedClient]
Responders = Callable[..., Responder]


async def test_many_texts_come_back_as_one_array_in_order(client: Clients, responder: Responders) -> None:
    texts = [f"text {n}" for n in range(1000)]
    async with responder() as other, client() as embedq:
        found = await embedq.embed_many(iter(texts), batch_size=7, in_flight=50)

    assert np.array_equal(found.vectors, rows(texts))
    assert found.model_version == OLD
    assert max(len(job.texts) for job in other.received) == 7


async def test_many_texts_with_some_bad_ones(client: Clients, responder: Responders) -> None:
    def odd_jobs_fail(job: Received) -> list[Answer]:
        if job.texts[0] in ("2", "6"):
            return [other.failure(job, ErrorBody.of("text_too_long", "m"))]
        return [other.good(job)]

    texts = [str(n) for n in range(10)]
    async with responder() as other, client() as embedq:
        other.behave = odd_jobs_fail
        with pytest.raises(PartialFailure) as raised:
            await embedq.embed_many(texts, batch_size=2)

    assert list(raised.value.errors) == [2, 3, 6, 7]
    assert np.array_equal(raised.value.vectors[9].data, expected("9"))


async def test_many_texts_over_a_reload_come_from_one_model(client: Clients, responder: Responders) -> None:
    def reloading(job: Received) -> list[Answer]:
        other.version = OLD if len(other.received) <= 3 else NEW
        return [other.good(job)]

    texts = [str(n) for n in range(20)]
    async with responder() as other, client() as embedq:
        other.behave = reloading
        found = await embedq.embed_many(texts, batch_size=2)

    assert np.array_equal(found.vectors, rows(texts, NEW))


async def test_a_stream_gives_every_text_in_order(client: Clients, responder: Responders) -> None:
    def backwards(job: Received) -> list[Answer]:
        return [other.good(job)]

    texts = [f"text {n}" for n in range(300)]
    async with responder() as other, client() as embedq:
        other.behave = backwards
        found = [item async for item in embedq.stream(iter(texts), batch_size=4, in_flight=32)]

    assert [item.index for item in found] == list(range(300))
    assert [item.text for item in found] == texts
    assert np.array_equal(np.stack([item.vector for item in found if item.vector is not None]), rows(texts))
    assert {item.model_version for item in found} == {OLD}


async def test_a_stream_as_completed_does_not_wait_for_a_slow_one(
    client: Clients, responder: Responders
) -> None:
    held: list[Received] = []

    def first_is_slow(job: Received) -> list[Answer] | None:
        if job.texts == ["0"]:
            held.append(job)
            return None
        return [other.good(job)]

    async with responder() as other, client() as embedq:
        other.behave = first_is_slow
        seen = []
        async with aclosing(embedq.stream((str(n) for n in range(10)), batch_size=1, ordered=False)) as items:
            async for item in items:
                seen.append(item.index)
                if len(seen) == 9:
                    await other.send(held[0], other.good(held[0]))

    assert sorted(seen) == list(range(10))
    assert seen[-1] == 0


async def test_a_stream_pulls_no_more_than_its_window(client: Clients, responder: Responders) -> None:
    pulled = 0

    def endless() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield str(pulled)

    async with responder() as other, client() as embedq:
        async with aclosing(embedq.stream(endless(), batch_size=4, in_flight=20)) as items:
            async for item in items:
                assert pulled <= item.index + 1 + 20
                if item.index == 203:
                    break
            # Every text that was pulled is answered by now or soon, and still nobody pulls.
            await wait_until(lambda: embedq.in_flight == 0, what="the window's answers")
            assert pulled <= 204 + 20
        assert sum(len(job.texts) for job in other.received) <= 204 + 20
        assert embedq._runner.in_flight.held == (0, 0)


async def test_a_stream_bounds_bytes_too(client: Clients, responder: Responders) -> None:
    pulled = 0

    def endless() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield "x" * 1000

    async with responder(), client() as embedq:
        stream = embedq.stream(endless(), batch_size=1, in_flight=10_000, in_flight_bytes=5000)
        async with aclosing(stream) as items:
            async for item in items:
                assert pulled <= item.index + 1 + 5
                if item.index == 50:
                    break


async def test_a_slow_source_is_not_waited_for_to_fill_a_batch(
    client: Clients, responder: Responders
) -> None:
    answered = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "first"
        await answered.wait()
        yield "second"

    async with responder() as other, client() as embedq:
        found = []
        async for item in embedq.stream(source(), batch_size=100):
            found.append(item.text)
            answered.set()

    assert found == ["first", "second"]
    assert [job.texts for job in other.received] == [["first"], ["second"]]


async def test_a_slow_taker_blocks_no_other_call(client: Clients, responder: Responders) -> None:
    async with (
        responder(),
        client(max_in_flight_texts=8) as embedq,
        aclosing(embedq.stream((str(n) for n in range(100)), batch_size=4, in_flight=8)) as items,
    ):
        await anext(items)

        assert np.array_equal(await embedq.embed("another"), expected("another"))


async def test_a_source_that_raises_does_so_after_what_it_gave(
    client: Clients, responder: Responders
) -> None:
    def broken() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise LookupError("the file ended")

    async with responder(), client() as embedq:
        stream = embedq.stream(broken(), batch_size=1)

        assert [(await anext(stream)).text for _ in range(3)] == ["a", "b", "c"]
        with pytest.raises(LookupError, match="the file ended"):
            await anext(stream)
        assert embedq.in_flight == 0
        assert embedq._runner.in_flight.held[0] == 0


@pytest.mark.parametrize("errors", ["raise", "return"])
async def test_a_bad_text_in_a_stream_is_raised_or_returned(
    client: Clients, responder: Responders, errors: str
) -> None:
    def third_fails(job: Received) -> list[Answer]:
        if job.texts != ["2"]:
            return [other.good(job)]
        bad = Datum(index=0, embedding=None, error=ErrorBody.of("text_too_long", "m", "input[0]"))
        return [changed(other.good(job), data=[bad])]

    found = []
    async with responder() as other, client() as embedq:
        other.behave = third_fails
        stream = embedq.stream((str(n) for n in range(5)), batch_size=1, errors=errors)  # type: ignore[arg-type]
        if errors == "raise":
            with pytest.raises(TextTooLong):
                found.extend([item async for item in stream])
        else:
            found.extend([item async for item in stream])
            assert [item.index for item in found] == [0, 1, 2, 3, 4]
            assert [item.error is None for item in found] == [True, True, False, True, True]
            assert isinstance(found[2].error, JobFailed)
            assert found[2].vector is None
        await wait_until(lambda: embedq.in_flight == 0, what="no job under way")


async def test_a_stream_without_answers_ends_at_each_jobs_deadline(
    client: Clients, responder: Responders
) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: None
        with pytest.raises(DeadlineExceeded):
            async for _ in embedq.stream(["a", "b"], timeout=patient(1.5)):
                pass

        assert embedq.in_flight == 0


async def test_closing_the_client_ends_its_streams(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        other.behave = lambda job: None

        async def consume() -> None:
            async for _ in embedq.stream(str(n) for n in range(100)):
                pass

        consuming = asyncio.create_task(consume())
        await wait_until(lambda: len(other.received) > 0, what="the first job")
    with pytest.raises(ClientClosed):
        await consuming


async def test_an_empty_stream_is_empty_and_an_empty_array_is_an_error(client: Clients) -> None:
    async with client() as embedq:
        assert [item async for item in embedq.stream([])] == []
        with pytest.raises(InvalidArgument, match="at least one text"):
            await embedq.embed_many([])
        with pytest.raises(InvalidArgument, match="an iterable of strings"):
            await anext(embedq.stream("a string is not a list of texts"))


async def test_what_came_before_a_value_that_is_no_text_is_embedded_and_then_the_value_is_named(
    client: Clients, responder: Responders
) -> None:
    async with responder(), client() as embedq:
        stream = embedq.stream(["a", 5], ordered=False, flush_after=1.0)  # type: ignore[list-item]
        assert (await anext(stream)).text == "a"
        with pytest.raises(InvalidArgument, match=r"texts\[1\]"):
            await anext(stream)
