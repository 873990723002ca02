"""The request machine without a broker: a fake transport answers at once, late, wrongly or never."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_sdk.embeddings import FinishedJob
from embedq_sdk.errors import (
    ClientClosed,
    DeadlineExceeded,
    EmbedError,
    InternalError,
    InvalidArgument,
    KafkaRefused,
    KafkaUnavailable,
    MixedModelVersions,
    Overloaded,
    ServiceOverloaded,
    TextTooLong,
    TopicMissing,
    UnknownModel,
    UnreadableReply,
)
from embedq_sdk.job_options import JobInputs, JobOptions
from embedq_sdk.transport.job_runner import Deadline, JobRunner
from embedq_sdk.transport.routing import Router
from embedq_shared.codec import decode_job
from embedq_shared.headers import client_of, parse
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import Topics
from embedq_shared.weighted_semaphore import WeightedSemaphore
from tests.helpers.fake_service import NEW, OLD, Answer, Received, reply_record, rows
from tests.helpers.fake_transport import FakeTransport, Record
from tests.helpers.support import wait_until

SOON = 0.02
"""Seconds until a deadline that a test lets pass."""
OPTIONS = JobOptions()


def inputs(*jobs: list[str]) -> list[JobInputs]:
    return [JobInputs(texts, sum(map(len, texts))) for texts in jobs]


class Machine:
    """A runner on a fake transport, and short ways to use it."""

    def __init__(self, *limits: int, pause: float = 0.0, max_attempts: int | None = None) -> None:
        self.transport = FakeTransport()
        self.service = self.transport.service
        self.runner = JobRunner(
            self.transport,
            Router(Topics("t")),
            WeightedSemaphore(*limits),
            pause=lambda attempt: pause,
            client=b"us",
            max_attempts=max_attempts,
        )
        self.transport.deliver = self.runner.deliver
        self.runner.open()

    async def run(self, *jobs: list[str], timeout: float = 10.0, **options: Any) -> list[FinishedJob]:
        return await self.runner.run(inputs(*jobs), JobOptions(**options), Deadline.after(timeout))

    async def embed(
        self, *jobs: list[str], timeout: float = 10.0, allow_mixed: bool = False
    ) -> np.ndarray[Any, Any]:
        deadline = Deadline.after(timeout)
        finished = await self.runner.run(inputs(*jobs), OPTIONS, deadline)
        found = await self.runner.merge(finished, inputs(*jobs), OPTIONS, deadline, allow_mixed=allow_mixed)
        return found.vectors

    async def submit(self, texts: str | list[str], *, timeout: float = 10.0, **options: Any) -> None:
        size = sum(map(len, texts))
        job = JobOptions(**options)
        await self.runner.submit(texts, size, job, id="the-id", format="json", timeout=timeout)

    def fails(self, code: Any) -> None:
        self.service.behave = lambda job: [self.service.failure(job, ErrorBody.of(code, "expected better"))]

    def stays_silent(self) -> None:
        self.service.behave = lambda job: None

    @property
    def idle(self) -> bool:
        return self.runner.awaiting_reply == 0 and self.runner.in_flight.held == (0, 0)


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    """Whatever a test does with it, nothing is held in the end."""
    machine = Machine(100, 10_000)
    yield machine
    assert machine.idle
    assert not machine.runner._submitted


# -- what is sent -----------------------------------------------------------------------------------------------------


async def test_a_job_names_its_reply_address_and_its_deadline(machine: Machine) -> None:
    before = time.time()
    await machine.run(["x"], timeout=20)

    (job,) = machine.transport.sent
    headers = parse(job.headers)
    assert (headers.reply_topic, headers.reply_partition) == ("t.replies", 3)
    assert headers.deadline_ms == pytest.approx((before + 20) * 1000, abs=1000)
    assert headers.content_type == b"application/msgpack"
    assert dict(headers.echo) == {"correlation-id": job.correlation}
    assert decode_job(job.value, "msgpack").id == job.correlation.hex()


async def test_a_lane_is_a_topic_and_a_trace_is_a_header(machine: Machine) -> None:
    await machine.run(["x"])
    await machine.run(["x"], lane="bulk", trace="00-aa-bb-01")

    first, second = machine.transport.sent
    assert (first.topic, second.topic) == ("t.jobs", "t.jobs.bulk")
    assert dict(second.headers)["traceparent"] == b"00-aa-bb-01"
    assert "traceparent" not in dict(first.headers)


async def test_every_job_says_whose_it_is(machine: Machine) -> None:
    await machine.run(["x"])
    await machine.submit("x")
    assert [client_of(job.headers) for job in machine.transport.sent] == [
        client_of([("client-id", b"us")])
    ] * 2


async def test_one_text_is_sent_as_a_string_and_several_as_a_list(machine: Machine) -> None:
    await machine.run(["x"], ["a", "b"])

    assert [job.job.input for job in machine.service.received] == ["x", ["a", "b"]]


# -- outcomes ---------------------------------------------------------------------------------------------------------


async def test_jobs_of_a_call_run_at_once_and_come_back_in_their_order(machine: Machine) -> None:
    machine.stays_silent()
    held = machine.service.received
    call = asyncio.create_task(machine.embed(["a", "b"], ["c"], ["d", "e"]))
    await wait_until(lambda: len(held) == 3, what="all jobs of the call")
    for job in reversed(held):
        machine.transport.reply(job, machine.service.good(job))

    assert np.array_equal(await call, rows(["a", "b", "c", "d", "e"]))


async def test_parts_are_joined_in_any_order_and_repeats_are_only_counted(machine: Machine) -> None:
    def shuffled(job: Received) -> list[Answer]:
        first, *others = machine.service.parts(job, 1)
        return [*reversed(others), *others, first, first]

    machine.service.behave = shuffled

    assert np.array_equal(await machine.embed(["a", "b", "c"]), rows(["a", "b", "c"]))
    await asyncio.sleep(0)
    assert machine.runner.unclaimed_replies == 1


async def test_an_error_of_the_service_is_the_jobs_outcome_and_the_others_have_theirs(
    machine: Machine,
) -> None:
    def second_fails(job: Received) -> list[Answer]:
        error = ErrorBody.of("text_too_long", "m", "input[0]")
        return [machine.service.failure(job, error) if job.texts == ["b"] else machine.service.good(job)]

    machine.service.behave = second_fails
    first, second, third = await machine.run(["a"], ["b"], ["c"])

    assert isinstance(second.outcome, TextTooLong)
    assert second.outcome.param == "input[0]"
    assert isinstance(first.outcome, list)
    assert isinstance(third.outcome, list)
    assert second.model_version is None


async def test_a_reply_that_cannot_be_read_ends_its_call_and_says_where_it_is(machine: Machine) -> None:
    machine.stays_silent()
    held = machine.service.received
    call = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: bool(held), what="the job")
    machine.transport.reply(held[0], machine.service.good(held[0]), value=b"\xc1", offset=17)

    with pytest.raises(UnreadableReply, match="at offset 17"):
        await call


@pytest.mark.parametrize(
    "changes",
    [
        {"dimensions": 32},
        {"dtype": "int8"},
        {"data": []},
        {"data": [{"index": 5, "embedding": bytes(256)}]},
        {"data": [{"index": 0, "embedding": b"\xff" * 256}]},
        {"data": [{"index": 0, "embedding": None}]},
        {"part": 3},
        {"parts": 2**31},
        {"object": "poem"},
    ],
    ids=lambda changes: str(changes)[:30],
)
async def test_a_malformed_reply_costs_its_own_call_and_no_other(
    machine: Machine, changes: dict[str, Any]
) -> None:
    machine.stays_silent()
    held = machine.service.received
    bad, good = (asyncio.create_task(machine.run([text])) for text in "ab")
    await wait_until(lambda: len(held) == 2, what="both jobs")
    value, _ = reply_record(held[0], machine.service.good(held[0]))
    forged = msgspec.msgpack.encode(msgspec.msgpack.decode(value) | changes)
    machine.transport.reply(held[0], machine.service.good(held[0]), value=forged, offset=17)
    machine.transport.reply(held[1], machine.service.good(held[1]))

    with pytest.raises(UnreadableReply, match="at offset 17"):
        await bad
    assert isinstance((await good)[0].outcome, list)


@pytest.mark.parametrize("value", [b"", None])
async def test_a_reply_without_a_value_is_unreadable_too(machine: Machine, value: bytes | None) -> None:
    machine.stays_silent()
    call = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: bool(machine.transport.sent), what="the job")
    machine.runner.deliver(
        Record(value, [("correlation-id", machine.transport.sent[0].correlation)], offset=1)
    )

    with pytest.raises(UnreadableReply):
        await call


async def test_replies_for_nobody_are_counted_and_not_decoded(machine: Machine) -> None:
    machine.runner.deliver(Record(b"\xc1", []))
    machine.runner.deliver(Record(b"\xc1", [("correlation-id", b"another client's")]))

    assert machine.runner.unclaimed_replies == 2


async def test_of_repeated_headers_the_last_one_counts(machine: Machine) -> None:
    machine.stays_silent()
    call = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: bool(machine.service.received), what="the job")
    job = machine.service.received[0]
    headers = [("correlation-id", b"no"), ("content-type", b"application/json"), *job.headers.echo]
    headers.append(("content-type", b"application/msgpack"))
    machine.transport.reply(job, machine.service.good(job), headers=headers)

    assert (await call)[0].model_version == OLD


# -- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["overloaded", "internal"])
async def test_a_passing_error_is_retried_with_the_same_record(machine: Machine, code: Any) -> None:
    def third_time_lucky(job: Received) -> list[Answer]:
        bad = machine.service.failure(job, ErrorBody.of(code, "busy"))
        return [bad] if job.seen < 3 else [machine.service.good(job)]

    machine.service.behave = third_time_lucky

    assert np.array_equal(await machine.embed(["x"]), rows(["x"]))
    assert len(machine.transport.sent) == 3
    assert len({(job.value, job.correlation) for job in machine.transport.sent}) == 1


async def test_a_retry_forgets_the_parts_of_the_attempt_before(machine: Machine) -> None:
    """Otherwise parts of two attempts could be joined: the retry is there so that one attempt makes all vectors."""

    def half_then_busy_then_half(job: Received) -> list[Answer]:
        first, second = machine.service.parts(job, 1)
        if job.seen == 1:
            return [first, machine.service.failure(job, ErrorBody.of("overloaded", "busy"))]
        return [second]

    machine.service.behave = half_then_busy_then_half
    call = asyncio.create_task(machine.embed(["a", "b"]))
    await wait_until(lambda: len(machine.transport.sent) == 2, what="the retry")
    await asyncio.sleep(0)
    assert not call.done()
    again = machine.service.received[1]
    machine.transport.reply(again, machine.service.parts(again, 1)[0])

    assert np.array_equal(await call, rows(["a", "b"]))


@pytest.mark.parametrize(("code", "kind"), [("overloaded", ServiceOverloaded), ("internal", InternalError)])
async def test_a_lasting_error_is_the_outcome_when_no_retry_could_end_in_time(code: Any, kind: type) -> None:
    machine = Machine(100, 10_000, pause=60.0)
    machine.fails(code)

    (job,) = await machine.run(["x"], timeout=30.0)

    assert isinstance(job.outcome, kind)
    assert len(machine.transport.sent) == 1
    assert machine.idle


@pytest.mark.parametrize(("of_runner", "of_call", "sent"), [(3, None, 3), (None, 2, 2), (5, 1, 1), (1, 4, 4)])
async def test_an_error_that_may_heal_is_the_outcome_after_as_many_attempts_as_were_allowed(
    of_runner: int | None, of_call: int | None, sent: int
) -> None:
    """What a call says comes before what the client says."""
    machine = Machine(100, 10_000, max_attempts=of_runner)
    machine.fails("overloaded")

    deadline = Deadline.after(30.0, max_attempts=of_call)
    (job,) = await machine.runner.run(inputs(["x"]), OPTIONS, deadline)

    assert isinstance(job.outcome, ServiceOverloaded)
    assert len(machine.transport.sent) == sent
    assert machine.idle


async def test_an_error_of_the_job_is_not_retried(machine: Machine) -> None:
    machine.fails("unknown_model")

    (job,) = await machine.run(["x"])

    assert isinstance(job.outcome, UnknownModel)
    assert len(machine.transport.sent) == 1


async def test_a_call_that_is_cancelled_during_the_pause_sends_nothing_more() -> None:
    machine = Machine(100, 10_000, pause=10.0)
    machine.fails("overloaded")
    call = asyncio.create_task(machine.run(["x"], timeout=60.0))
    await wait_until(lambda: any(job.retry_timer for job in machine.transport.sent), what="the pause")
    call.cancel()
    await asyncio.wait([call])

    (job,) = machine.transport.sent
    assert job.retry_timer is not None
    assert job.retry_timer.cancelled()
    assert machine.idle


async def test_a_job_without_a_deadline_is_our_own_fault(machine: Machine) -> None:
    machine.stays_silent()
    (each,) = inputs(["x"])
    assert machine.runner.in_flight.try_acquire(1, each.size)
    job = machine.runner.begin(each, OPTIONS, Deadline.after(10))
    job.drop()
    job.deadline_timer = None
    with pytest.raises(RuntimeError, match="This is a bug"):
        machine.runner._retry(job)
    machine.runner.finish(job)


# -- another reply topic than before ------------------------------------------------------------------------------------


def addresses(job: Received) -> tuple[str | None, int | None]:
    return job.headers.reply_topic, job.headers.reply_partition


async def test_after_a_move_the_jobs_of_now_are_sent_again_to_the_new_address_and_the_old_answers_do_not_count(
    machine: Machine,
) -> None:
    machine.stays_silent()
    held = machine.service.received
    calls = [asyncio.create_task(machine.embed([text, text])) for text in "ab"]
    await wait_until(lambda: len(held) == 2, what="both jobs")
    half, _ = machine.service.parts(held[0], 1)
    machine.transport.reply(held[0], half)
    machine.transport.reply_partition = 1
    machine.runner.move()
    assert [addresses(job) for job in held] == [("t.replies", 3)] * 2 + [("t.replies", 1)] * 2
    assert [dict(job.headers.echo) for job in held[2:]] == [dict(job.headers.echo) for job in held[:2]]
    machine.transport.reply(held[2], machine.service.parts(held[2], 1)[1])
    await asyncio.sleep(0)
    assert not calls[0].done(), "parts of two attempts were joined"
    for job in held[2:]:
        machine.transport.reply(job, machine.service.good(job))

    first, second = await asyncio.gather(*calls)
    assert np.array_equal(first, rows(["a", "a"]))
    assert np.array_equal(second, rows(["b", "b"]))


async def test_a_move_is_no_attempt_and_sends_no_job_that_waits_for_its_next_one() -> None:
    machine = Machine(100, 10_000, pause=0.1, max_attempts=2)
    machine.fails("overloaded")
    call = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: any(job.retry_timer for job in machine.transport.sent), what="the pause")
    machine.transport.reply_partition = 1
    machine.runner.move()
    assert len(machine.transport.sent) == 1
    machine.stays_silent()
    await wait_until(lambda: len(machine.transport.sent) == 2, what="the second attempt")
    assert addresses(machine.service.received[1]) == ("t.replies", 1)
    machine.runner.move()
    assert len(machine.transport.sent) == 3
    machine.transport.reply(machine.service.received[2], machine.service.good(machine.service.received[2]))

    (job,) = await call
    assert isinstance(job.outcome, list)
    assert machine.idle


@pytest.mark.parametrize(
    "error",
    [KafkaRefused(servers="s", reason="r"), TopicMissing(servers="s", topic="t.replies")],
    ids=lambda error: type(error).__name__,
)
async def test_where_no_reply_can_be_read_who_waits_for_one_is_told_and_who_does_not_is_not(
    machine: Machine, error: KafkaRefused | TopicMissing
) -> None:
    machine.stays_silent()
    waiting = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: len(machine.transport.sent) == 1, what="the job")
    machine.transport.acknowledges = False
    submitting = asyncio.create_task(machine.submit("y"))
    await wait_until(lambda: len(machine.transport.sent) == 2, what="both jobs")
    machine.runner.refuse(error)

    with pytest.raises(type(error), match=str(error)):
        await waiting
    assert not submitting.done()
    machine.transport.sent[1].complete([])
    await submitting


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent", "acknowledged", "kind", "says"),
    [
        (False, True, DeadlineExceeded, r"No result within 0\.02 s \(the job is in Kafka\)"),
        (False, False, DeadlineExceeded, r"the job is on its way to Kafka"),
        (True, True, KafkaUnavailable, r"it took the job, then stopped answering within 0\.02 s"),
        (True, False, KafkaUnavailable, r"it did not take the job within 0\.02 s"),
    ],
)
async def test_a_deadline_says_what_is_likely_wrong(
    machine: Machine, silent: bool, acknowledged: bool, kind: type[EmbedError], says: str
) -> None:
    machine.stays_silent()
    machine.transport.silent = silent
    machine.transport.acknowledges = acknowledged

    with pytest.raises(kind, match=says):
        await machine.run(["x"], timeout=SOON)


async def test_a_reply_after_the_deadline_is_only_counted(machine: Machine) -> None:
    machine.stays_silent()
    with pytest.raises(DeadlineExceeded):
        await machine.run(["x"], timeout=SOON)
    late = machine.service.received[0]
    machine.transport.reply(late, machine.service.good(late))

    assert machine.runner.unclaimed_replies == 1


async def test_one_job_that_misses_the_deadline_ends_the_call_and_frees_the_others(machine: Machine) -> None:
    machine.service.behave = lambda job: [machine.service.good(job)] if job.texts == ["a"] else None

    with pytest.raises(DeadlineExceeded):
        await machine.run(["a"], ["b"], ["c"], timeout=SOON)


async def test_cancelling_a_call_frees_all_it_held(machine: Machine) -> None:
    machine.stays_silent()
    calls = [asyncio.create_task(machine.run(["a", "b"], ["c"])) for _ in range(10)]
    await wait_until(lambda: machine.runner.awaiting_reply == 20, what="all jobs under way")
    for call in calls:
        call.cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(end, asyncio.CancelledError) for end in ended)


# -- what is in flight ------------------------------------------------------------------------------------------------


async def test_a_call_beyond_the_limits_waits_and_then_says_so() -> None:
    machine = Machine(2, 10_000)
    machine.stays_silent()
    first = asyncio.create_task(machine.run(["a", "b"]))
    await wait_until(lambda: machine.runner.awaiting_reply == 1, what="the first call")
    with pytest.raises(Overloaded, match=r"^2 texts and 2 bytes are in flight.* within 0\.02 s$"):
        await machine.run(["c"], timeout=SOON)
    with pytest.raises(Overloaded):
        await machine.submit("d", timeout=SOON)
    first.cancel()
    await asyncio.wait([first])

    machine.service.behave = None
    assert np.array_equal(await machine.embed(["e"]), rows(["e"]))
    assert machine.idle


async def test_a_call_that_waits_goes_on_when_another_one_ends() -> None:
    machine = Machine(1, 10_000)

    found = await asyncio.gather(*(machine.embed([str(n)]) for n in range(5)))

    assert np.array_equal(np.concatenate(found), rows([str(n) for n in range(5)]))
    assert machine.idle


async def test_what_cannot_be_written_gives_back_what_it_acquired(machine: Machine) -> None:
    class Broken(JobOptions, frozen=True):
        def encode(self, *args: Any, **more: Any) -> bytes:
            raise LookupError("no bytes")

    with pytest.raises(LookupError):
        await machine.runner.run(inputs(["a"]), Broken(), Deadline.after(1))
    with pytest.raises(LookupError):
        await machine.runner.submit("a", 1, Broken(), id="i", format="json", timeout=1)


# -- one model's vectors ----------------------------------------------------------------------------------------------


async def test_the_part_of_an_older_model_is_requested_once_more(machine: Machine) -> None:
    def reloading(job: Received) -> list[Answer]:
        machine.service.version = NEW if "c" in job.texts or len(machine.service.received) > 3 else OLD
        return [machine.service.good(job)]

    machine.service.behave = reloading

    assert np.array_equal(await machine.embed(["a"], ["b"], ["c"]), rows(["a", "b", "c"], NEW))
    assert [job.texts for job in machine.service.received] == [["a"], ["b"], ["c"], ["a"], ["b"]]


async def test_vectors_of_two_models_are_returned_only_if_allowed(machine: Machine) -> None:
    def torn(job: Received) -> list[Answer]:
        machine.service.version = NEW if "c" in job.texts else OLD
        return [machine.service.good(job)]

    machine.service.behave = torn

    with pytest.raises(MixedModelVersions) as raised:
        await machine.embed(["a", "b"], ["c"])
    assert raised.value.versions == [OLD, OLD, NEW]
    mixed = await machine.embed(["a", "b"], ["c"], allow_mixed=True)
    assert np.array_equal(mixed, np.concatenate([rows(["a", "b"]), rows(["c"], NEW)]))


async def test_a_job_that_failed_has_no_version_and_is_not_requested_again(machine: Machine) -> None:
    def last_fails(job: Received) -> list[Answer]:
        error = ErrorBody.of("text_too_long", "m")
        return [machine.service.failure(job, error) if job.texts == ["c"] else machine.service.good(job)]

    machine.service.behave = last_fails
    found = await machine.embed(["a"], ["b"], ["c"])

    assert len(machine.service.received) == 3
    assert np.array_equal(found[:2], rows(["a", "b"]))
    assert not found[2].any()


async def test_the_second_round_keeps_the_calls_deadline(machine: Machine) -> None:
    def reloading(job: Received) -> list[Answer] | None:
        machine.service.version = NEW if "b" in job.texts else OLD
        return [machine.service.good(job)] if len(machine.service.received) <= 2 else None

    machine.service.behave = reloading

    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        await machine.embed(["a"], ["b"], timeout=0.05)


# -- closing and breaking ---------------------------------------------------------------------------------------------


async def test_closing_ends_every_job_and_accepts_no_more(machine: Machine) -> None:
    machine.stays_silent()
    machine.transport.acknowledges = False
    calls = [asyncio.create_task(machine.run(["x"])), asyncio.create_task(machine.submit("y"))]
    await wait_until(lambda: len(machine.transport.sent) == 2, what="both jobs")
    machine.runner.close()

    for call in calls:
        with pytest.raises(ClientClosed):
            await call
    with pytest.raises(ClientClosed):
        await machine.run(["z"])
    with pytest.raises(ClientClosed):
        await machine.submit("z")


async def test_a_runner_that_was_never_opened_accepts_nothing() -> None:
    runner = JobRunner(FakeTransport(), Router(Topics()), WeightedSemaphore(1, 1))

    with pytest.raises(ClientClosed):
        await runner.run(inputs(["x"]), OPTIONS, Deadline.after(1))
    assert runner.in_flight.held == (0, 0)


async def test_a_transport_that_breaks_is_named_as_a_bug_to_all_calls_now_and_later(machine: Machine) -> None:
    machine.stays_silent()
    call = asyncio.create_task(machine.run(["x"]))
    await wait_until(lambda: bool(machine.transport.sent), what="the job")
    fault = ZeroDivisionError("in the sender")
    machine.runner.break_down(fault)

    with pytest.raises(EmbedError) as now:
        await call
    with pytest.raises(EmbedError) as later:
        await machine.submit("y")
    for raised in (now, later):
        assert raised.value.__cause__ is fault
        assert "This is a bug." in raised.value.__notes__[0]


# -- jobs whose results go to the results topic -----------------------------------------------------------------------


async def test_a_submitted_job_has_no_deadline_and_no_reply_address(machine: Machine) -> None:
    await machine.submit(["a", "b"], lane="bulk", trace="00-aa-bb-01")

    (job,) = machine.transport.sent
    headers = parse(job.headers)
    assert (headers.reply_topic, headers.reply_partition, headers.deadline_ms) == (None, None, None)
    assert headers.content_type == b"application/json"
    assert dict(job.headers)["traceparent"] == b"00-aa-bb-01"
    assert job.topic == "t.jobs.bulk"
    assert (decode_job(job.value, "json").id, decode_job(job.value, "json").input) == ("the-id", ["a", "b"])


async def test_a_submitted_job_that_kafka_does_not_acknowledge_is_unavailable(machine: Machine) -> None:
    machine.transport.acknowledges = False

    with pytest.raises(KafkaUnavailable, match=r"did not acknowledge the job within 0\.02 s"):
        await machine.submit("x", timeout=SOON)


async def test_a_submitted_job_that_the_broker_refuses_raises_what_the_sender_says(machine: Machine) -> None:
    machine.transport.acknowledges = False
    call = asyncio.create_task(machine.submit("x"))
    await wait_until(lambda: bool(machine.transport.sent), what="the job")
    machine.transport.sent[0].fail(InvalidArgument(argument="texts", expected="less", got="more"))

    with pytest.raises(InvalidArgument, match="`texts`: expected less"):
        await call
