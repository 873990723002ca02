"""The public verbs without a broker: what each accepts, sends and returns. The machine below has tests of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from embedq_sdk import (
    ClientClosed,
    ClientNotOpened,
    EmbedClient,
    EmbedError,
    InvalidArgument,
    JobFailed,
    KafkaUnavailable,
    MixedModelVersions,
    PartialFailure,
    TextTooLong,
    WrongEventLoop,
    late,
    mean,
)
from embedq_sdk import client as client_module
from embedq_shared.messages import Datum, ErrorBody
from tests.helpers.fake_service import NEW, OLD, Answer, FakeService, Received, changed, expected, rows
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.support import wait_until

Clients = Callable[..., EmbedClient]


class Side:
    """The other side of the clients that a test makes."""

    transport: FakeTransport

    @property
    def service(self) -> FakeService:
        return self.transport.service


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    side = Side()

    def connect(*args: Any, **more: Any) -> FakeTransport:
        side.transport = FakeTransport(*args, **more)
        return side.transport

    monkeypatch.setattr(client_module, "KafkaTransport", connect)
    return side


@pytest.fixture
def client(side: Side) -> Clients:
    return lambda **settings: EmbedClient("fake:9092", **settings)


def second_fails(job: Received) -> list[Answer]:
    good = FakeService().good(job)
    bad = Datum(index=1, embedding=None, error=ErrorBody.of("text_too_long", "m", "input[1]"))
    return [changed(good, data=[good.data[0], bad, *good.data[2:]])]


def refuses(job: Received) -> list[Answer]:
    return [FakeService.failure(job, ErrorBody.of("text_too_long", "m", "input"))]


# -- life -------------------------------------------------------------------------------------------------------------


VERBS: dict[str, Callable[[EmbedClient], Awaitable[object]]] = {
    "embed": lambda client: client.embed("x"),
    "embed_detailed": lambda client: client.embed_detailed(["x"]),
    "embed_chunks": lambda client: client.embed_chunks("x"),
    "embed_many": lambda client: client.embed_many(["x"]),
    "stream": lambda client: anext(client.stream(["x"])),
    "submit": lambda client: client.submit("x"),
}
EVERYTHING = VERBS | {"open": lambda client: client.open(), "close": lambda client: client.close()}


async def test_a_client_works_until_it_is_closed(client: Clients, side: Side) -> None:
    embedq = client()
    async with embedq:
        assert np.array_equal(await embedq.embed("x"), expected("x"))
        assert embedq.reply_partition == 3
    assert side.transport.closed
    for verb in VERBS.values():
        with pytest.raises(ClientClosed, match="is closed: make a new one"):
            await verb(embedq)
    with pytest.raises(ClientClosed, match="is closed"):
        await embedq.__aenter__()
    with pytest.raises(ClientClosed, match="is closed"):
        await embedq.open()
    await embedq.close()  # again


@pytest.mark.parametrize("verb", VERBS)
async def test_a_client_that_was_not_opened_says_how_to_open_it(client: Clients, verb: str) -> None:
    with pytest.raises(ClientNotOpened, match=r"not opened yet.*`async with .*`await client\.open\(\)`"):
        await VERBS[verb](client())


async def test_open_and_close_do_what_a_block_does(client: Clients, side: Side) -> None:
    embedq = await client().open()
    assert np.array_equal(await embedq.embed("x"), expected("x"))
    assert await embedq.open() is embedq  # a notebook's cell that runs again
    async with embedq:
        assert np.array_equal(await embedq.embed("y"), expected("y"))
    assert (side.transport.opened, side.transport.closed) == (1, True)
    with pytest.raises(ClientClosed):
        await embedq.embed("x")


async def test_two_that_open_at_once_connect_once(client: Clients, side: Side) -> None:
    embedq = client()
    side.transport.may_open.clear()
    opening = [asyncio.create_task(embedq.open()) for _ in range(3)]
    await wait_until(lambda: side.transport.opened == 1, what="the first")
    with pytest.raises(ClientNotOpened):
        await embedq.embed("x")
    side.transport.may_open.set()
    await asyncio.gather(*opening)
    assert side.transport.opened == 1
    await embedq.close()


async def test_a_client_that_could_not_connect_may_be_opened_later(client: Clients, side: Side) -> None:
    embedq = client()
    side.transport.fails_to_open = KafkaUnavailable(servers="fake:9092", reason="refused")
    for _ in range(2):
        with pytest.raises(KafkaUnavailable):
            await embedq.open()
        with pytest.raises(ClientNotOpened):
            await embedq.embed("x")
    side.transport.fails_to_open = None
    async with embedq:
        await embedq.embed("x")


async def test_a_client_that_is_closed_while_it_opens_keeps_no_connection(
    client: Clients, side: Side
) -> None:
    embedq = client()
    side.transport.may_open.clear()
    opening = asyncio.create_task(embedq.open())
    await wait_until(lambda: side.transport.opened == 1, what="the beginning")
    await embedq.close()
    side.transport.closed = False
    side.transport.may_open.set()
    with pytest.raises(ClientClosed):
        await opening
    assert side.transport.closed


# A framework that runs each request with `asyncio.run` is the usual way to get several loops.


@pytest.mark.parametrize("verb", EVERYTHING)
def test_a_client_of_a_loop_that_has_ended_says_so_at_once(client: Clients, side: Side, verb: str) -> None:
    embedq = client()

    async def use() -> None:
        await EVERYTHING[verb](embedq)

    asyncio.run(embedq.open())
    sent = len(side.transport.sent)
    with pytest.raises(WrongEventLoop, match=r"one that has ended.*asyncio\.run begins a new loop"):
        asyncio.run(use())
    assert len(side.transport.sent) == sent


@pytest.mark.parametrize("verb", EVERYTHING)
async def test_a_client_in_another_thread_says_so_at_once(client: Clients, side: Side, verb: str) -> None:
    raised: list[WrongEventLoop] = []
    async with client() as embedq:

        async def use() -> None:
            await EVERYTHING[verb](embedq)

        def elsewhere() -> None:
            try:
                asyncio.run(use())
            except WrongEventLoop as error:
                raised.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await wait_until(lambda: not thread.is_alive(), what="the other thread's end")
        assert not side.transport.sent
        assert np.array_equal(await embedq.embed("x"), expected("x"))  # here it goes on

    (error,) = raised
    assert "one that runs in another thread" in str(error)


async def test_a_loop_that_failed_to_open_a_client_does_not_keep_it(client: Clients, side: Side) -> None:
    embedq = client()
    side.transport.fails_to_open = KafkaUnavailable(servers="fake:9092", reason="refused")

    def elsewhere() -> None:
        with pytest.raises(KafkaUnavailable):
            asyncio.run(embedq.open())

    await asyncio.to_thread(elsewhere)
    side.transport.fails_to_open = None
    async with embedq:
        await embedq.embed("x")


async def test_leaving_the_block_does_not_hide_why(client: Clients) -> None:
    with pytest.raises(ZeroDivisionError):
        async with client():
            raise ZeroDivisionError


async def test_closing_ends_calls_that_wait(client: Clients, side: Side) -> None:
    async with client() as embedq:
        side.service.behave = lambda job: None
        waiting = asyncio.create_task(embedq.embed("x"))
        await wait_until(lambda: embedq.in_flight == 1, what="the job")
    with pytest.raises(ClientClosed):
        await waiting


async def test_a_fault_of_the_transport_reaches_the_caller(client: Clients, side: Side) -> None:
    async with client() as embedq:
        side.service.behave = lambda job: None
        waiting = asyncio.create_task(embedq.embed("x"))
        await wait_until(lambda: embedq.in_flight == 1, what="the job")
        assert side.transport.broken is not None
        side.transport.broken(ZeroDivisionError())
        with pytest.raises(EmbedError) as raised:
            await waiting
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# -- embed ------------------------------------------------------------------------------------------------------------


async def test_a_list_comes_back_in_its_order_whatever_its_texts(client: Clients, side: Side) -> None:
    texts = ["b", "a", "", "b", "日本語 🎉"]
    async with client(max_inputs=2) as embedq:
        assert np.array_equal(await embedq.embed(texts), rows(texts))
    assert [job.texts for job in side.service.received] == [["b", "a"], ["", "b"], ["日本語 🎉"]]


async def test_what_is_asked_for_is_what_is_sent(client: Clients, side: Side) -> None:
    async with client() as embedq:
        found = await embedq.embed_detailed(
            "x",
            model="m",
            dimensions=32,
            dtype="int8",
            input_type="query",
            instruction="find",
            truncate="end",
            metadata={"n": [1, {"k": None}]},
            lane="bulk",
        )

    (received,) = side.service.received
    assert (received.job.model, received.job.dimensions, received.job.dtype) == ("m", 32, "int8")
    assert (received.job.input_type, received.job.instruction, received.job.truncate) == (
        "query",
        "find",
        "end",
    )
    assert received.topic == "embed.jobs.bulk"
    assert found.metadata == {"n": [1, {"k": None}]}
    assert np.abs(found.vectors[0] - expected("x", 32)).max() < 0.01


async def test_wrong_arguments_send_nothing(client: Clients, side: Side) -> None:
    async with client() as embedq:
        for wrong in ([], None, ["a", 3], b"x"):
            with pytest.raises(InvalidArgument, match="`texts"):
                await embedq.embed(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="`timeout`"):
            await embedq.embed("x", timeout=0)
        with pytest.raises(InvalidArgument, match="`texts`: expected at most 900,000 bytes"):
            await embedq.embed("x" * 5_000_000)
        with pytest.raises(InvalidArgument, match="`errors`"):
            await embedq.embed_detailed("x", errors="ignore")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="`errors`"):
            await embedq.embed_many(["x"], errors="ignore")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="`errors`"):
            await anext(embedq.stream(["x"], errors="ignore"))  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="`batch_size`"):
            await anext(embedq.stream(["x"], batch_size=0))
        with pytest.raises(TypeError, match="dimension"):
            await embedq.embed("x", dimension=64)  # type: ignore[call-arg]
    assert side.service.received == []


async def test_failed_texts_are_raised_or_returned(client: Clients, side: Side) -> None:
    async with client() as embedq:
        side.service.behave = second_fails
        with pytest.raises(PartialFailure) as raised:
            await embedq.embed(["a", "b", "c"])
        returned = await embedq.embed_detailed(["a", "b", "c"], errors="return")
        side.service.behave = refuses
        with pytest.raises(TextTooLong):
            await embedq.embed("x")
        with pytest.raises(TextTooLong):
            await embedq.embed_detailed(["x", "y"], errors="return")  # no job has a result to return

    assert list(raised.value.errors) == list(returned.errors) == [1]
    assert np.array_equal(raised.value.vectors[[0, 2]].data, rows(["a", "c"]))


async def test_late_chunks_have_a_verb_of_their_own(client: Clients, side: Side) -> None:
    text = "The moon is round. 😀"
    async with client() as embedq:
        chunks = await embedq.embed_chunks(text, chunk=late(8))
        (whole,) = await embedq.embed_chunks(text)
        mean_vector = await embedq.embed(text, chunk=mean(64))
        with pytest.raises(InvalidArgument, match="for late chunking use embed_chunks"):
            await embedq.embed(text, chunk=late())
        with pytest.raises(InvalidArgument, match="chunk"):
            await embedq.embed_chunks(text, chunk=mean())
        with pytest.raises(InvalidArgument, match="`text`"):
            await embedq.embed_chunks(["a list"])  # type: ignore[arg-type]

    assert "".join(chunk.of(text) for chunk in chunks) == text
    assert all(np.array_equal(chunk.vector, expected(chunk.of(text))) for chunk in chunks)
    assert whole.of(text) == text
    assert np.array_equal(mean_vector, expected(text))


# -- many texts -------------------------------------------------------------------------------------------------------


async def test_many_texts_come_back_as_one_array_of_one_model(client: Clients, side: Side) -> None:
    def reloading(job: Received) -> list[Answer]:
        side.service.version = OLD if len(side.service.received) <= 3 else NEW
        return [side.service.good(job)]

    texts = [str(n) for n in range(20)]
    async with client() as embedq:
        side.service.behave = reloading
        found = await embedq.embed_many(iter(texts), batch_size=2, in_flight=4)

    assert np.array_equal(found.vectors, rows(texts, NEW))
    assert len(side.service.received) == 13


async def test_many_texts_of_a_column_become_one_array(client: Clients, side: Side) -> None:
    async with client() as embedq:
        found = await embedq.embed_many(np.array(["a", "b", "c"]), batch_size=2)
        streamed = [item.text async for item in embedq.stream(np.array(["a", "b"]))]
        tables: list[Any] = [{"text": ["a"]}, np.array([["a"], ["b"]])]
        for table in tables:
            with pytest.raises(InvalidArgument, match="`texts`"):
                await embedq.embed_many(table)

    array = np.asarray(found)
    assert array.shape == (3, 64)
    assert array.dtype == np.float32
    assert np.array_equal(array, rows(["a", "b", "c"]))
    assert streamed == ["a", "b"]


async def test_many_texts_of_two_models_are_returned_only_if_allowed(client: Clients, side: Side) -> None:
    def torn(job: Received) -> list[Answer]:
        side.service.version = OLD if job.texts == ["a"] else NEW
        return [side.service.good(job)]

    async with client() as embedq:
        side.service.behave = torn
        with pytest.raises(MixedModelVersions):
            await embedq.embed_many(["a", "b"], batch_size=1)
        found = await embedq.embed_many(["a", "b"], batch_size=1, allow_mixed=True)

    assert found.model_versions == [OLD, NEW]


async def test_many_texts_with_some_bad_ones(client: Clients, side: Side) -> None:
    def some_fail(job: Received) -> list[Answer]:
        return refuses(job) if "2" in job.texts else [side.service.good(job)]

    async with client() as embedq:
        side.service.behave = some_fail
        with pytest.raises(PartialFailure) as raised:
            await embedq.embed_many(map(str, range(6)), batch_size=2)
        returned = await embedq.embed_many(map(str, range(6)), batch_size=2, errors="return")

    assert list(raised.value.errors) == list(returned.errors) == [2, 3]


@pytest.mark.parametrize("errors", ["raise", "return"])
async def test_a_bad_text_in_a_stream_is_raised_or_returned(client: Clients, side: Side, errors: Any) -> None:
    found = []
    async with client() as embedq:
        side.service.behave = second_fails
        async with aclosing(embedq.stream(["a", "b", "c"], batch_size=3, errors=errors)) as items:
            found.append(await anext(items))
            if errors == "raise":
                with pytest.raises(TextTooLong):
                    await anext(items)
            else:
                found += [item async for item in items]

    assert [item.text for item in found if item.error is None] == (["a"] if errors == "raise" else ["a", "c"])
    assert all(isinstance(item.error, JobFailed) for item in found if item.vector is None)


# -- submit and results -----------------------------------------------------------------------------------------------


async def test_a_submitted_job_has_the_given_id_or_a_new_one(client: Clients, side: Side) -> None:
    async with client() as embedq:
        assert await embedq.submit("x", id="mine", format="json") == "mine"
        drawn = await embedq.submit(["x"], lane="interactive")

    first, second = side.service.received
    assert (first.id, first.format, first.topic, first.job.input) == ("mine", "json", "embed.jobs.bulk", "x")
    assert (second.id, second.format, second.topic) == (drawn, "msgpack", "embed.jobs")
    assert second.job.input == ["x"]
    assert first.headers.reply_topic is None


async def test_what_no_job_can_hold_is_refused(client: Clients, side: Side) -> None:
    async with client(max_inputs=3) as embedq:
        with pytest.raises(InvalidArgument, match="at most 3 texts"):
            await embedq.submit(["x"] * 4)
        with pytest.raises(InvalidArgument, match="`id`"):
            await embedq.submit("x", id="")
        with pytest.raises(InvalidArgument, match="`format`"):
            await embedq.submit("x", format="xml")  # type: ignore[arg-type]
    assert side.service.received == []


async def test_results_are_read_as_the_arguments_say(
    client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        client_module, "read_results", lambda connection, topic, **more: asked.append((topic, more))
    )
    embedq = client(topic_prefix="p", connect_timeout=3.0)
    embedq.results(group="g", from_beginning=True, timeout=5)
    embedq.results()
    with pytest.raises(InvalidArgument, match="`timeout`"):
        embedq.results(timeout=0)

    assert [topic for topic, _ in asked] == ["p.results"] * 2
    assert asked[0][1] == {"group": "g", "from_beginning": True, "connect_timeout": 3.0, "idle": 5.0}
    assert asked[1][1] == {"group": None, "from_beginning": False, "connect_timeout": 3.0, "idle": None}
