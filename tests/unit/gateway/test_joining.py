"""Small calls of one moment share a job, and each has the outcome that it would have had alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.embedding import joined
from embedq_gateway.joining import JoiningClient
from embedq_sdk import EmbedClient
from embedq_sdk import client as client_module
from embedq_sdk.embeddings import FinishedJob
from embedq_sdk.errors import DeadlineExceeded, EmbedError, InvalidJob
from embedq_sdk.job_options import JobOptions, late
from embedq_shared.messages import ErrorBody
from tests.helpers.fake_service import Answer, FakeService, Received, changed, expected
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.support import wait_until

OPTIONS = JobOptions(model="default")


class Shared:
    """A joining client over a fake service."""

    def __init__(self, transport: FakeTransport, client: EmbedClient, most: int) -> None:
        self.transport = transport
        self.sdk = client
        self.client = JoiningClient(client, most)

    @property
    def service(self) -> FakeService:
        return self.transport.service

    @property
    def jobs(self) -> list[list[str]]:
        return [received.texts for received in self.service.received]

    async def call(
        self, *texts: str, options: JobOptions = OPTIONS, timeout: float = 30.0
    ) -> list[FinishedJob]:
        return await self.client.embed_raw(list(texts), options, timeout=timeout)


async def shared(most: int = 8) -> Shared:
    transports: list[FakeTransport] = []

    def connect(*args: Any, **more: Any) -> FakeTransport:
        transports.append(FakeTransport(*args, **more))
        return transports[-1]

    with mock.patch.object(client_module, "KafkaTransport", connect):
        client = EmbedClient("fake:9092")
    await client.open()
    return Shared(transports[0], client, most)


@pytest.fixture
async def one() -> AsyncIterator[Shared]:
    found = await shared()
    yield found
    await found.sdk.close()


def check(finished: Sequence[FinishedJob], *texts: str) -> None:
    answer = joined(finished, "default")
    assert [datum.index for datum in answer.data] == list(range(len(texts)))
    for datum, text in zip(answer.data, texts, strict=True):
        assert np.frombuffer(datum.embedding, "<f4").tobytes() == expected(text).tobytes()
    assert answer.tokens == sum(len(text.split()) for text in texts)


async def test_calls_of_one_moment_share_a_job(one: Shared) -> None:
    found = await asyncio.gather(one.call("a"), one.call("b c", "d"), one.call("e"))
    check(found[0], "a")
    check(found[1], "b c", "d")
    check(found[2], "e")
    assert one.jobs == [["a", "b c", "d", "e"]]


async def test_a_call_alone_is_a_job_as_ever(one: Shared) -> None:
    check(await one.call("a"), "a")
    check(await one.call("b"), "b")
    assert one.jobs == [["a"], ["b"]]


async def test_a_job_has_no_more_texts_than_it_may(one: Shared) -> None:
    found = await asyncio.gather(*(one.call(f"t{n}", f"u{n}") for n in range(9)))
    for n, each in enumerate(found):
        check(each, f"t{n}", f"u{n}")
    assert sorted(len(job) for job in one.jobs) == [2, 8, 8]


@pytest.mark.parametrize(
    "other",
    [
        {"options": JobOptions(model="other")},
        {"options": JobOptions(model="default", dimensions=32)},
        {"options": JobOptions(model="default", lane="bulk")},
        {"options": JobOptions(model="default", client_id="key:other")},
        {"options": JobOptions(model="default", trace="00-1-1-01")},
        {"timeout": 5.0},
    ],
)
async def test_calls_that_differ_in_anything_share_nothing(one: Shared, other: dict[str, Any]) -> None:
    await asyncio.gather(one.call("a"), one.call("b", **other))
    assert sorted(one.jobs) == [["a"], ["b"]]


async def test_large_and_late_calls_have_jobs_of_their_own(one: Shared) -> None:
    await asyncio.gather(
        one.call("a"),
        one.call(*"bcdefghi"),
        one.call("x" * 40_000),
        one.call("long text", options=JobOptions(model="default", chunk=late(8))),
    )
    assert len(one.jobs) == 4


async def test_with_1_nothing_is_joined() -> None:
    alone = await shared(most=1)
    await asyncio.gather(alone.call("a"), alone.call("b"))
    assert len(alone.jobs) == 2
    await alone.sdk.close()


async def test_an_input_that_fails_fails_its_own_call_alone(one: Shared) -> None:
    def fail(received: Received) -> list[Answer]:
        good = one.service.good(received)
        error = ErrorBody(code="non_finite", message="`input[2]`: expected numbers", param="input[2]")
        data = list(good.data)
        if len(data) > 2:
            data[2] = msgspec.structs.replace(data[2], embedding=None, error=error)
        return [changed(good, data=data)]

    one.service.behave = fail
    first, second, third = await asyncio.gather(one.call("a", "b"), one.call("c"), one.call("d", "e"))
    check(first, "a", "b")
    check(third, "d", "e")
    outcome = second[0].outcome
    assert isinstance(outcome, EmbedError)
    assert str(outcome) == "non_finite: `input`: expected numbers"


async def test_where_a_job_fails_whole_its_calls_run_alone(one: Shared) -> None:
    def crash(received: Received) -> list[Answer]:
        if "poison" in received.texts:
            return [one.service.failure(received, ErrorBody.of("crashed", "it ended", "input"))]
        return [one.service.good(received)]

    one.service.behave = crash
    good, bad = await asyncio.gather(one.call("a"), one.call("poison"))
    check(good, "a")
    assert isinstance(bad[0].outcome, InvalidJob)
    assert one.jobs == [["a", "poison"], ["a"], ["poison"]]


async def test_what_the_client_raises_every_call_gets(one: Shared) -> None:
    one.service.behave = lambda received: None
    found = await asyncio.gather(
        one.call("a", timeout=0.05), one.call("b", timeout=0.05), return_exceptions=True
    )
    assert [type(each) for each in found] == [DeadlineExceeded, DeadlineExceeded]


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_call_that_is_cancelled_stops_no_other(one: Shared, gone: int) -> None:
    calls = [asyncio.create_task(one.call(f"t{n}")) for n in range(3)]
    await asyncio.sleep(0)
    calls[gone].cancel()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[gone], asyncio.CancelledError)
    for n, each in enumerate(found):
        if n != gone:
            assert isinstance(each, list)
            check(each, f"t{n}")


async def test_a_job_for_which_nobody_waits_any_more_is_cancelled(one: Shared) -> None:
    one.service.behave = lambda received: None
    calls = [asyncio.create_task(one.call(f"t{n}")) for n in range(3)]
    await wait_until(lambda: one.sdk.in_flight == 1, what="the job")
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await wait_until(lambda: one.sdk.in_flight == 0, what="its end")
    assert one.transport.sent[0].future.cancelled()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), each=st.integers(1, 4))
def test_whatever_comes_together_every_call_gets_its_own_vectors(sizes: list[int], each: int) -> None:
    async def check_all() -> None:
        one = await shared()
        one.service.behave = lambda received: list(one.service.parts(received, each))
        wanted = [[f"call {n} text {k}" for k in range(size)] for n, size in enumerate(sizes)]
        found = await asyncio.gather(*(one.call(*texts) for texts in wanted))
        for texts, finished in zip(wanted, found, strict=True):
            check(finished, *texts)
        assert all(len(job) <= 9 for job in one.jobs)
        await one.sdk.close()

    asyncio.run(check_all())
