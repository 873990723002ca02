"""The blocking verbs without a broker: what they return, in which threads things happen, and how a client ends."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from blockbuster import BlockBuster

from embedq_sdk import (
    ClientClosed,
    EmbedError,
    InvalidArgument,
    KafkaUnavailable,
    PartialFailure,
    TextTooLong,
)
from embedq_sdk.blocking import EmbedClient
from embedq_sdk.blocking import client as blocking_client
from embedq_sdk.blocking.session import making
from embedq_shared.headers import client_of
from embedq_shared.messages import Datum, ErrorBody
from tests.helpers.fake_service import OLD, Answer, FakeService, Received, changed, expected, rows
from tests.helpers.lazily import lazily
from tests.helpers.support import patient, wait_for, wait_until
from tests.unit.sdk.blocking.conftest import Clients, Side

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazily("pandas")

TEXTS = [f"text {n}" for n in range(100)]

VERBS: dict[str, Callable[[EmbedClient], object]] = {
    "open": lambda client: client.open(),
    "embed": lambda client: client.embed("x"),
    "embed_detailed": lambda client: client.embed_detailed(["x"]),
    "embed_chunks": lambda client: client.embed_chunks("x"),
    "embed_many": lambda client: client.embed_many(["x"]),
    "stream": lambda client: next(client.stream(["x"])),
    "submit": lambda client: client.submit("x"),
    "results": lambda client: next(client.results()),
    "begin": lambda client: client.begin(lambda embedq: embedq.embed("x")),
    "reply_partition": lambda client: client.reply_partition,
}


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def second_fails(job: Received) -> list[Answer]:
    good = FakeService().good(job)
    bad = Datum(index=1, embedding=None, error=ErrorBody.of("text_too_long", "m", "input[1]"))
    return [changed(good, data=[good.data[0], bad, *good.data[2:]])]


# -- what comes back --------------------------------------------------------------------------------------------------


def test_a_text_and_a_list_come_back_as_from_the_async_client(client: Clients) -> None:
    embedq = client()
    assert np.array_equal(embedq.embed("hello"), expected("hello"))
    assert np.array_equal(
        embedq.embed(["b", "a"], dimensions=32), np.stack([expected("b", 32), expected("a", 32)])
    )
    found = embedq.embed_detailed(["one", "one two"])
    assert (found.model_version, found.tokens.tolist()) == (OLD, [1, 2])


def test_what_is_asked_for_is_what_is_sent(client: Clients, side: Side) -> None:
    client().embed("x", input_type="query", instruction="find", lane="bulk", model="m")
    (job,) = side.service.received
    assert (job.job.input_type, job.job.instruction, job.job.model) == ("query", "find", "m")
    assert job.topic.endswith(".jobs.bulk")


def series(texts: list[str]) -> Any:
    return pd.Series(texts)


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, series], ids=lambda kind: kind.__name__)
def test_many_texts_of_any_kind_come_back_in_order(client: Clients, kind: Callable[[list[str]], Any]) -> None:
    assert np.array_equal(client().embed_many(kind(TEXTS), batch_size=7), rows(TEXTS))


def test_a_column_is_mapped_text_by_text(client: Clients) -> None:
    embedq = client()
    vectors = pd.Series(TEXTS[:5]).map(embedq.embed)
    assert np.array_equal(np.stack(vectors.to_list()), rows(TEXTS[:5]))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
def test_a_stream_gives_every_text_with_its_vector(
    client: Clients, kind: Callable[[list[str]], Any], ordered: bool
) -> None:
    found = list(client().stream(kind(TEXTS), batch_size=8, in_flight=24, ordered=ordered))
    assert sorted(item.index for item in found) == list(range(100))
    assert all(np.array_equal(item, expected(TEXTS[item.index])) for item in found)
    assert not ordered or [item.index for item in found] == list(range(100))


def test_texts_that_fail_are_raised_or_returned_as_asked(client: Clients, side: Side) -> None:
    embedq = client()
    side.service.behave = second_fails
    with pytest.raises(PartialFailure):
        embedq.embed(["a", "b", "c"])
    assert list(embedq.embed_many(["a", "b", "c"], errors="return").errors) == [1]
    items = list(embedq.stream(iter(["a", "b", "c"]), errors="return"))
    assert [type(item.error) for item in items] == [type(None), TextTooLong, type(None)]
    with pytest.raises(TextTooLong):
        list(embedq.stream(iter(["a", "b", "c"])))


def test_a_job_is_submitted(client: Clients, side: Side) -> None:
    assert client().submit("x", id="row-17") == "row-17"
    assert side.service.received[0].topic.endswith(".jobs.bulk")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda client: client.embed(7),
        lambda client: client.embed_many("x"),
        lambda client: client.embed_many([]),
        lambda client: client.embed_many(iter([])),
        lambda client: client.embed_many(iter(["x"]), batch_size=0),
        lambda client: client.embed_many(pd.DataFrame({"a": ["x"]})),
        lambda client: client.stream(["x"], errors="ignore"),
        lambda client: client.stream(["x"], lane="express"),
        lambda client: client.stream(["x"], in_flight=0),
        lambda client: list(client.stream("x")),
        lambda client: list(client.stream(iter(["x", 7]))),
        lambda client: client.results(timeout=-1),
        lambda client: list(client.stream(anext)),
    ],
)
def test_a_wrong_argument_is_refused(client: Clients, wrong: Callable[[EmbedClient], object]) -> None:
    embedq = client()
    with pytest.raises(InvalidArgument):
        wrong(embedq)
    assert embedq.in_flight == 0


def test_an_async_source_is_for_the_async_client(client: Clients) -> None:
    async def texts() -> Any:
        yield "x"

    with pytest.raises(InvalidArgument, match="only the async client reads"):
        client().stream(texts())


@pytest.mark.parametrize(
    ("settings", "named"), [({"topic_prefix": "a/b"}, "topic_prefix"), ({"ssl_certfle": "x"}, "ssl_certfle")]
)
def test_a_wrong_setting_is_refused_when_a_client_is_made(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        EmbedClient("localhost:9092", **settings)
    with pytest.raises(InvalidArgument, match="no port"):
        EmbedClient("localhost")


# -- life -------------------------------------------------------------------------------------------------------------


def test_a_client_connects_at_its_first_call_and_once(client: Clients, side: Side) -> None:
    embedq = client()
    assert (side.transport.opened, embedq.in_flight, embedq.unclaimed_replies) == (0, 0, 0)
    embedq.embed("x")
    assert embedq.open() is embedq
    with embedq as same:
        assert same.reply_partition == 3
    assert (side.transport.opened, side.transport.closed, len(side.transports)) == (1, True, 1)


@pytest.mark.parametrize("verb", VERBS)
def test_a_closed_client_says_so(client: Clients, verb: str) -> None:
    for used in (True, False):
        embedq = client()
        if used:
            embedq.embed("x")
        embedq.close()
        embedq.close()
        with pytest.raises(ClientClosed, match="is closed: make a new one"):
            VERBS[verb](embedq)


def test_many_threads_share_one_connection(client: Clients, side: Side) -> None:
    embedq = client()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(embedq.embed, TEXTS))
    assert np.array_equal(np.stack(found), rows(TEXTS))
    assert (len(side.transports), side.transport.opened) == (1, 1)


def test_closing_ends_the_calls_that_wait_in_other_threads(client: Clients, side: Side) -> None:
    embedq = client().open()
    side.service.behave = lambda job: None
    ends: list[BaseException] = []

    def call(verb: Callable[[], object]) -> None:
        try:
            verb()
        except EmbedError as error:
            ends.append(error)

    calls = [
        in_thread(lambda: call(lambda: embedq.embed("x"))),
        in_thread(lambda: call(lambda: embedq.embed_many(iter(["x"])))),
        in_thread(lambda: call(lambda: list(embedq.stream(iter(["x"]))))),
    ]
    wait_for(lambda: embedq.in_flight == 3, what="all calls under way")
    embedq.close()
    for each in calls:
        each.join(patient(10))
    assert [type(end) for end in ends] == [ClientClosed] * 3


def test_all_who_wait_for_a_connection_share_one_attempt_and_a_later_call_makes_another(
    client: Clients, side: Side
) -> None:
    embedq = client()
    side.transport.fails_to_open = KafkaUnavailable(servers="fake:9092", reason="refused")
    side.transport.may_open.clear()
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(embedq.embed, "x") for _ in range(8)]
        wait_for(lambda: side.transport.opened == 1, what="the attempt")
        begun = threading.Event()
        embedq._here().begin(_set(begun)).result()  # all eight came before
        embedq._here()._loop.call_soon_threadsafe(side.transport.may_open.set)
        errors = [call.exception() for call in calls]
    assert all(isinstance(error, KafkaUnavailable) for error in errors)
    tries = side.transport.opened
    assert tries < 8

    side.transport.fails_to_open = None
    assert np.array_equal(embedq.embed("x"), expected("x"))
    assert side.transport.opened == tries + 1


def _set(event: threading.Event) -> Callable[[], Any]:
    async def work() -> None:
        event.set()

    return work


def test_a_client_that_nobody_holds_is_closed(client: Clients, side: Side) -> None:
    embedq = EmbedClient("fake:9092")
    embedq.embed("x")
    session = weakref.ref(embedq._here())
    del embedq
    gc.collect()
    wait_for(lambda: side.transport.closed, what="a closed connection")
    wait_for(lambda: gc.collect() >= 0 and session() is None, what="a thread that has ended")


def test_what_is_under_way_keeps_its_client(client: Clients, side: Side) -> None:
    assert np.array_equal(EmbedClient("fake:9092").embed("x"), expected("x"))
    items = EmbedClient("fake:9092").stream(iter(TEXTS), batch_size=4, in_flight=8)
    future = EmbedClient("fake:9092").begin(lambda embedq: embedq.embed("y"))
    gc.collect()
    assert [item.index for item in items] == list(range(100))
    assert np.array_equal(future.result(patient(10)), expected("y"))


def test_calls_that_race_with_a_close_end(client: Clients) -> None:
    """Each is answered or says that the client is closed; none is left waiting, nor begun and forgotten."""

    def call(embedq: EmbedClient) -> bool:
        try:
            return np.array_equal(embedq.embed("x"), expected("x"))
        except ClientClosed:
            return False

    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            embedq = client().open()
            calls = [threads.submit(call, embedq) for _ in range(4)]
            embedq.close()
            assert {each.result(patient(10)) for each in calls} <= {True, False}


def test_a_finalizer_may_close_a_client_wherever_the_garbage_collector_runs(client: Clients) -> None:
    with making():
        embedq = client()
        embedq.embed("x")
        embedq.close()


# -- a source ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["stream", "embed_many"])
def test_a_lazy_source_is_read_in_the_callers_thread(client: Clients, verb: str) -> None:
    read_in = set()

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read_in.add(threading.get_ident())
            yield text

    assert len(list(getattr(client(), verb)(texts(), batch_size=8))) == 100
    assert read_in == {threading.get_ident()}


def test_a_source_may_use_the_client_itself(client: Clients) -> None:
    embedq = client()
    items = list(embedq.stream(str(embedq.embed(text).shape) for text in TEXTS[:10]))
    assert [item.text for item in items] == ["(64,)"] * 10


def test_a_source_is_read_no_further_than_the_window(client: Clients) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield str(read)

    items = client().stream(endless(), batch_size=4, in_flight=12)
    for n, item in zip(range(50), items, strict=False):
        assert item.index == n
        assert (
            read <= n + 12 + 4 + 4
        )  # the window, what was taken out of its last job, and what is read at a time
    items.close()


def test_the_window_stays_full_while_results_that_came_at_once_are_taken_out(
    client: Clients, side: Side
) -> None:
    """A caller that is slower than the service must not find an empty pipeline each time that it has taken out a window."""
    embedq = client().open()

    def all_at_once(job: Received) -> list[Answer]:
        received = side.service.received
        if len(received) == 10:
            loop = asyncio.get_running_loop()
            for each in received[:-1]:
                loop.call_soon(side.transport.reply, each, FakeService().good(each))
        return [] if len(received) < 10 else [FakeService().good(job)]

    side.service.behave = all_at_once
    for item in embedq.stream(iter(TEXTS), batch_size=4, in_flight=40):
        taken_out = item.index // 4
        assert sum(len(job.texts) for job in side.service.received) >= min(100, 40 + 4 * (taken_out - 1))


def test_a_source_that_raises_does_so_after_what_it_gave_before(client: Clients) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS[:10]
        raise LookupError("the table is gone")

    embedq = client()
    items = embedq.stream(texts(), batch_size=3)
    assert [next(items).index for _ in range(10)] == list(range(10))
    with pytest.raises(LookupError, match="the table is gone"):
        next(items)
    with pytest.raises(LookupError):
        embedq.embed_many(texts())
    assert embedq.in_flight == 0


def test_leaving_a_stream_early_drops_what_is_under_way(client: Clients, side: Side) -> None:
    embedq = client().open()
    side.service.behave = lambda job: None if "text 9" in job.texts else [FakeService().good(job)]
    for item in embedq.stream(iter(TEXTS), batch_size=1, in_flight=20):
        if item.index == 8:
            break
    wait_for(lambda: embedq.in_flight == 0, what="an empty window")
    assert embedq._here().client._runner.in_flight.held == (0, 0)


def test_a_stream_that_the_loops_own_thread_collects_ends(client: Clients, side: Side) -> None:
    """The garbage collector closes a generator wherever it happens to run."""
    embedq = client().open()
    items = embedq.stream(TEXTS, batch_size=1, in_flight=20)
    next(items)

    async def close() -> None:
        items.close()

    embedq._here().begin(close).result(patient(10))
    wait_for(lambda: embedq._here().client._runner.in_flight.held == (0, 0), what="nothing held")


# -- for both worlds --------------------------------------------------------------------------------------------------


async def test_a_future_is_awaited_in_any_event_loop(client: Clients) -> None:
    future = client().begin(lambda embedq: embedq.embed("x"))
    vector = await asyncio.wrap_future(future)
    assert np.array_equal(vector, expected("x"))


async def test_cancelling_who_awaits_cancels_the_call(client: Clients, side: Side) -> None:
    embedq = client()
    await asyncio.wrap_future(embedq.begin(lambda inner: inner.embed("x")))
    side.service.behave = lambda job: None
    call = asyncio.ensure_future(asyncio.wrap_future(embedq.begin(lambda inner: inner.embed("y"))))
    await wait_until(lambda: embedq.in_flight == 1, what="a call under way")
    call.cancel()
    await asyncio.wait([call])
    await wait_until(lambda: embedq.in_flight == 0, what="a call that was given up")


async def test_a_notebooks_cell_calls_it_while_its_event_loop_runs(
    client: Clients, blocking_calls: BlockBuster
) -> None:
    blocking_calls.deactivate()  # this call blocks the loop, and means to
    try:
        embedq = client()
        assert np.array_equal(embedq.embed("x"), expected("x"))
        assert len(list(embedq.stream(TEXTS))) == 100
        embedq.close()
    finally:
        blocking_calls.activate()


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [lambda client: pickle.loads(pickle.dumps(client)), copy.copy, copy.deepcopy]
)
def test_a_copy_connects_by_itself_and_counts_as_the_same_client(
    client: Clients, side: Side, copied: Callable[[EmbedClient], EmbedClient]
) -> None:
    embedq = client(topic_prefix="other")
    embedq.embed("x")
    embedq.close()
    with copied(embedq) as other:
        assert np.array_equal(other.embed("y"), expected("y"))
    first, second = side.transports
    assert (first.opened, second.opened) == (1, 1)
    assert client_of(first.sent[0].headers) == client_of(second.sent[0].headers)
    assert second.service.received[0].topic == "other.jobs"


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        (
            "sasl_plain_password",
            {
                "security_protocol": "SASL_PLAINTEXT",
                "sasl_plain_username": "u",
                "sasl_plain_password": "hunter2",
            },
        ),
        ("ssl_context", {"security_protocol": "SSL", "ssl_context": ssl.create_default_context()}),
    ],
)
def test_a_secret_is_not_pickled_and_not_shown(client: Clients, named: str, settings: dict[str, Any]) -> None:
    embedq = client(**settings)
    with pytest.raises(TypeError, match=f"`{named}` cannot be pickled.*make it where it is used") as raised:
        pickle.dumps(embedq)
    assert "hunter2" not in f"{raised.value} {embedq!r} {vars(embedq)}"


@pytest.mark.parametrize(
    "call",
    [lambda client: client.embed("x", timeout=600), lambda client: next(client.stream(["x"], timeout=600))],
)
def test_an_interruption_before_the_caller_waits_ends_the_call_too(
    call: Callable[[EmbedClient], object], client: Clients, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come when the work has begun, and nobody holds its future yet."""
    embedq = client()
    embedq.open()
    received = threading.Event()

    def silent(job: Received) -> list[Answer]:
        received.set()
        return []

    side.service.behave = silent

    def interrupted(future: object) -> None:
        assert received.wait(patient(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(blocking_client, "outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(embedq)
    session = embedq._session
    assert session is not None
    wait_for(lambda: session.client.in_flight == 0)


def test_a_call_that_was_left_while_the_client_was_being_opened_sends_nothing(
    client: Clients, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedq = client()
    side.transport.may_open.clear()

    def interrupted(future: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(blocking_client, "outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedq.embed("x", timeout=600)
    embedq._here()._loop.call_soon_threadsafe(side.transport.may_open.set)
    embedq.embed("y")
    assert [each.job.input for each in side.service.received] == ["y"]
