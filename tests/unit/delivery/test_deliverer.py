"""Results leave: published, then finished; what the brokers refuse, and what is counted."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import structlog
from aiokafka.errors import (
    InvalidTimestampError,
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits, _quick, large, undeliverable
from embedq_consumer.delivery.destination import Undelivered
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome, Spans
from embedq_consumer.intake.records import Record
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import Envelope
from embedq_shared.headers import JobHeaders, parse, value_of
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import LANES, Lane
from tests.helpers.fake_parts import ScriptedSink
from tests.helpers.in_flight import TOPICS, admitted, record
from tests.helpers.metric_values import sample_value
from tests.helpers.support import wait_until

ELSEWHERE = ("reply-topic", b"elsewhere")
ERROR = ErrorBody.of("text_too_long", "`input`: expected less", "input")
MALFORMED = ErrorBody.of("malformed", "expected a job")
Refusal = Callable[[Outgoing], Exception | None]


def nothing(record: Outgoing) -> None:
    """The brokers take everything."""


def refusing(error: Exception, *topics: str, keep: Refusal = nothing) -> Refusal:
    """The brokers take no record of these topics."""
    return lambda record: error if record.topic in topics else keep(record)


class Parts:
    def __init__(self, refusal: Refusal = nothing, *, limit: int = 900_000) -> None:
        self.metrics = Metrics()
        self.sink = ScriptedSink(refusal)
        encoder = ResultEncoder(TOPICS, "group", limit)
        self.behind: set[int] = set()
        limits = DeliveryLimits(
            reply_timeout_s=15, holds_back=lambda record: record.ticket.offset in self.behind
        )
        self.deliverer = Deliverer(encoder, self.sink, self.sink.finish, self.metrics, limits)

    async def deliver(self, *jobs: JobState) -> None:
        await self.deliverer.deliver(jobs)

    async def reject(self, found: Record, error: ErrorBody, *, dead_letter: bool) -> None:
        rejection = Rejection(
            error=error, format="json", headers=JobHeaders(), envelope=Envelope(), dead_letter=dead_letter
        )
        await self.deliverer.reject([(found, rejection)])

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)


@asynccontextmanager
async def delivering(refusal: Refusal = nothing, **options: int) -> AsyncIterator[Parts]:
    parts = Parts(refusal, **options)
    try:
        yield parts
    finally:
        await asyncio.to_thread(parts.deliverer.close)


def answered(*headers: tuple[str, bytes], offset: int = 7, **fields: Any) -> JobState:
    """A job whose every input has a vector."""
    job = admitted(*headers, **{"input": "a", "dimensions": 32, **fields})
    ticket = msgspec.structs.replace(job.record.ticket, offset=offset)
    job.record = msgspec.structs.replace(job.record, ticket=ticket)
    for index in range(len(job.request.texts)):
        job.settle(index, vector())
    return job


def vector(truncated: Any = None) -> InputVector:
    return InputVector(b"\0" * 128, 3, truncated, None, cached=False)


def body(outgoing: Outgoing) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(outgoing.value or b"")
    return found


# -- results ----------------------------------------------------------------------------------------------------------


async def test_a_record_is_finished_after_the_brokers_have_its_result() -> None:
    async with delivering() as parts:
        parts.sink.gate.clear()
        delivery = asyncio.create_task(parts.deliver(answered(offset=1), answered(offset=2)))
        await wait_until(lambda: len(parts.sink.timeouts) == 2)
        assert parts.sink.events == []
        parts.sink.open()
        await delivery
        assert parts.sink.events == [TOPICS.results, TOPICS.results, 1, 2]


@pytest.mark.parametrize(
    ("fields", "loop_alone"),
    [
        ({"input": "a"}, True),
        ({"input": [f"{number}" for number in range(32)]}, True),
        ({"input": [f"{number}" for number in range(65)]}, False),
        ({"input": "a", "chunk": {"mode": "late", "tokens": 8}}, False),  # it may have thousands of spans
    ],
    ids=["one text", "32 texts", "65 texts", "late chunks"],
)
async def test_results_that_are_quickly_encoded_need_no_thread(
    fields: dict[str, Any], loop_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_thread: list[object] = []
    in_thread = Deliverer.in_thread

    async def noted(deliverer: Deliverer, lane: Lane, work: Callable[..., Any], *args: Any) -> Any:
        on_thread.append(work)
        return await in_thread(deliverer, lane, work, *args)

    monkeypatch.setattr(Deliverer, "in_thread", noted)
    async with delivering() as parts:
        await parts.deliver(answered(**fields))
        assert parts.sink.finished == [7]
        assert bool(on_thread) != loop_alone


def test_results_are_encoded_on_the_event_loop_only_where_that_is_quick() -> None:
    one, many = answered(input="a", dimensions=256), answered(input=[f"{number}" for number in range(65)])
    assert _quick([one] * 32)
    assert not _quick([one] * 64), "too many bytes"
    assert not _quick([many]), "too many inputs"


async def test_a_job_that_waits_for_its_address_delays_no_other_of_its_delivery() -> None:
    async with delivering() as parts:
        parts.sink.stuck.add("elsewhere")
        jobs = [answered(offset=1), answered(ELSEWHERE, offset=2), answered(offset=3)]
        delivery = asyncio.create_task(parts.deliver(*jobs))
        await wait_until(lambda: len(parts.sink.finished) == 2)
        assert parts.sink.finished == [1, 3]
        assert parts.sample("jobs_total", lane="interactive", status="ok") == 2
        parts.sink.stuck.clear()
        parts.sink.open()
        await delivery
        assert parts.sink.finished == [1, 3, 2]


async def test_a_job_that_is_answered_otherwise_delays_no_other_of_its_delivery() -> None:
    async with delivering(refusing(InvalidTopicError(), "elsewhere")) as parts:
        parts.sink.stuck.add(TOPICS.dead_letters)
        delivery = asyncio.create_task(parts.deliver(answered(ELSEWHERE, offset=1), answered(offset=2)))
        await wait_until(lambda: len(parts.sink.to(TOPICS.results)) == 2)
        assert parts.sink.finished == [2]
        parts.sink.stuck.clear()
        parts.sink.open()
        await delivery
        assert parts.sink.finished == [2, 1]


async def test_only_a_result_at_an_address_of_the_callers_has_a_time_out() -> None:
    async with delivering(refusing(InvalidTopicError(), "elsewhere")) as parts:
        await parts.deliver(answered())
        assert parts.sink.timeouts == [(TOPICS.results, None)]
        partition = ("reply-partition", struct.pack(">i", 1))
        await parts.deliver(answered(partition))
        assert parts.sink.timeouts[1:] == [(TOPICS.results, 15)]
        await parts.deliver(answered(ELSEWHERE))
        assert parts.sink.timeouts[2:] == [
            ("elsewhere", 15),
            (TOPICS.results, 5.0),
            (TOPICS.dead_letters, None),
        ]


async def test_a_result_is_urgent_once_its_record_holds_others_back() -> None:
    async with delivering() as parts:
        parts.sink.stuck.add("elsewhere")
        delivery = asyncio.create_task(
            parts.deliver(answered(ELSEWHERE, offset=5), answered(ELSEWHERE, offset=6))
        )
        await wait_until(lambda: len(parts.sink.timeouts) == 2)
        fifth, sixth = parts.sink.urgent
        assert (fifth(), sixth()) == (False, False)
        parts.behind.add(5)
        assert (fifth(), sixth()) == (True, False)
        parts.sink.stuck.clear()
        parts.sink.open()
        await delivery


async def test_every_part_of_a_result_is_there_before_its_record_is_finished() -> None:
    async with delivering(limit=2_000) as parts:
        await parts.deliver(answered(input=[*"abcdefghijklmnopqrst"], encoding_format="base64"))
        *parts_sent, finished = parts.sink.events
        assert len(parts_sent) > 1
        assert (set(parts_sent), finished) == ({TOPICS.results}, 7)


async def test_what_was_answered_is_counted() -> None:
    async with delivering() as parts:
        job = admitted(input=["a", "b", "c", "d"], dimensions=32, truncate="end")
        outcomes: list[Outcome] = [vector(), vector("end"), ERROR, Spans((), 2)]
        for index, outcome in enumerate(outcomes):
            job.settle(index, outcome)
        await parts.deliver(job, answered())
        assert parts.sample("jobs_total", lane="interactive", status="partial") == 1
        assert parts.sample("jobs_total", lane="interactive", status="ok") == 1
        assert parts.sample("jobs_total", lane="bulk", status="ok") == 0
        assert parts.sample("errors_total", code="text_too_long") == 1
        assert parts.sample("inputs_total", lane="interactive") == 4
        assert parts.sample("truncated_total") == 1
        assert parts.sample("job_seconds_count", lane="interactive") == 2
        assert parts.sample("publish_seconds_count") == 1


# -- large results ----------------------------------------------------------------------------------------------------


def large_job(offset: int, client: bytes, *headers: tuple[str, bytes]) -> JobState:
    job = answered(*headers, input=[str(number) for number in range(600)], dimensions=256, offset=offset)
    job.record = msgspec.structs.replace(job.record, client=client)
    return job


async def test_large_results_are_encoded_one_at_a_time_and_clients_take_turns() -> None:
    flood, new = [large_job(offset, b"flood") for offset in range(8)], large_job(8, b"new")
    assert all(map(large, [*flood, new]))
    assert not large(answered(input=["a", "b"]))
    async with delivering() as parts:
        await asyncio.gather(*(parts.deliver(job) for job in [*flood, new]))
        assert parts.sink.finished.index(8) <= 3  # two were on their way


async def test_a_small_result_does_not_wait_for_large_ones() -> None:
    async with delivering() as parts:
        await asyncio.gather(
            *(parts.deliver(large_job(offset, b"flood")) for offset in range(4)),
            parts.deliver(answered(offset=9)),
        )
        assert parts.sink.finished.index(9) <= 1


async def test_two_large_results_are_on_their_way_to_a_place_and_those_for_other_places_do_not_wait() -> None:
    """So what comes behind them there waits for two, and not for a flood."""
    async with delivering() as parts:
        parts.sink.stuck.add("elsewhere")
        async with asyncio.TaskGroup() as tasks:
            for offset in range(6):
                tasks.create_task(parts.deliver(large_job(offset, b"flood", ELSEWHERE)))
            tasks.create_task(parts.deliver(large_job(8, b"other")))
            await wait_until(lambda: parts.sink.finished == [8], what="the other place's result")
            waiting = len(parts.sink.timeouts)
            tasks.create_task(parts.deliver(answered(ELSEWHERE, offset=9)))
            await wait_until(lambda: len(parts.sink.timeouts) > waiting, what="the small one behind them")
            parts.sink.stuck.clear()
            parts.sink.open()
        assert parts.sink.finished.index(9) <= 3
        assert sorted(parts.sink.finished) == [0, 1, 2, 3, 4, 5, 8, 9]


# -- refused results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (MessageSizeTooLargeError(), "result_too_large"),
        (RecordListTooLargeError(), "result_too_large"),
        (TopicAuthorizationFailedError(), "invalid_header"),
        (InvalidTimestampError(), "invalid_header"),
        (Undelivered("for 15 s they took no record"), "undeliverable"),
    ],
)
async def test_a_result_that_is_refused_becomes_an_error_on_the_results_topic(
    reason: Exception, code: str
) -> None:
    async with delivering(refusing(reason, "elsewhere")) as parts:
        with structlog.testing.capture_logs() as logs:
            await parts.deliver(answered(offset=1), answered(ELSEWHERE, offset=2))
        [fine, error] = parts.sink.to(TOPICS.results)
        assert (body(fine)["object"], body(error)["error"]["code"]) == ("list", code)
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert value_of(letter.headers, "embedq-result-sent") == b"true"
        assert parts.sink.finished == [1, 2]
        assert parts.sink.events.index(TOPICS.dead_letters) < parts.sink.events.index(2)
        assert parts.sample("jobs_total", lane="interactive", status="error") == 1
        assert parts.sample("jobs_total", lane="interactive", status="ok") == 1
        assert parts.sample("errors_total", code=code) == 1
        assert parts.sample("dead_letters_total", code=code) == 1
        assert [entry["event"] for entry in logs] == ["result_undeliverable"]


async def test_one_refused_part_makes_the_whole_result_an_error() -> None:
    def last_part(record: Outgoing) -> Exception | None:
        parts = body(record) if record.topic == "elsewhere" else {}
        return MessageSizeTooLargeError() if parts.get("part") == 1 else None

    async with delivering(last_part, limit=2_000) as parts:
        await parts.deliver(answered(ELSEWHERE, input=[*"abcdefghijklmnopqrst"], encoding_format="base64"))
        [error] = parts.sink.to(TOPICS.results)
        assert body(error)["error"]["code"] == "result_too_large"
        assert parts.sink.finished == [7]


async def test_a_job_whose_error_is_refused_too_has_its_dead_letter_alone() -> None:
    async with delivering(refusing(MessageSizeTooLargeError(), "elsewhere", TOPICS.results)) as parts:
        await parts.deliver(answered(ELSEWHERE))
        assert parts.sink.events == [TOPICS.dead_letters, 7]
        [letter] = parts.sink.sent
        assert value_of(letter.headers, "embedq-result-sent") == b"false"


# -- rejected records and dead letters ---------------------------------------------------------------------------------


async def test_a_rejected_record_gets_an_error_and_is_finished() -> None:
    async with delivering() as parts:
        await parts.reject(record(b"{}"), ERROR, dead_letter=False)
        [error] = parts.sink.sent
        assert body(error)["error"]["code"] == "text_too_long"
        assert parts.sink.events == [TOPICS.results, 7]
        assert parts.sample("jobs_total", lane="interactive", status="error") == 1
        assert parts.sample("errors_total", code="text_too_long") == 1
        assert parts.sample("dead_letters_total", code="text_too_long") == 0
        assert parts.sample("inputs_total", lane="interactive") is None


async def test_a_rejected_record_that_is_to_be_kept_goes_to_the_dead_letters_before_it_is_finished() -> None:
    async with delivering() as parts:
        await parts.reject(record(b"junk", key=b"k"), MALFORMED, dead_letter=True)
        assert parts.sink.events == [TOPICS.results, TOPICS.dead_letters, 7]
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert (letter.key, letter.value, letter.partition) == (b"k", b"junk", 3)
        assert parts.sample("dead_letters_total", code="malformed") == 1


@pytest.mark.parametrize(("partitions", "expected"), [(4, 3), (3, None), (None, None)])
async def test_a_dead_letter_keeps_its_partition_where_the_topic_has_it(
    partitions: int | None, expected: int | None
) -> None:
    async with delivering() as parts:
        del parts.sink.known[TOPICS.dead_letters]
        if partitions is not None:
            parts.sink.known[TOPICS.dead_letters] = partitions
        await parts.reject(record(b"junk"), MALFORMED, dead_letter=True)
        assert parts.sink.to(TOPICS.dead_letters)[0].partition == expected


async def test_a_dead_letter_that_is_refused_goes_by_its_position() -> None:
    def with_content(record: Outgoing) -> Exception | None:
        return MessageSizeTooLargeError() if record.value == b"junk" else None

    async with delivering(with_content) as parts:
        await parts.reject(record(b"junk", key=b"k"), MALFORMED, dead_letter=True)
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert (letter.key, letter.value, letter.partition) == (b"t.jobs-3-7", None, 3)
        assert value_of(letter.headers, "embedq-error-code") == b"malformed"
        assert parts.sink.finished == [7]


async def test_a_dead_letter_whose_timestamp_is_refused_goes_without_it() -> None:
    def too_old(record: Outgoing) -> Exception | None:
        return InvalidTimestampError() if record.timestamp_ms is not None else None

    async with delivering(too_old) as parts:
        await parts.reject(record(b"junk", key=b"k"), MALFORMED, dead_letter=True)
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert (letter.key, letter.value, letter.timestamp_ms) == (b"k", b"junk", None)


async def test_a_dead_letter_may_go_to_another_partition_and_waits_without_end() -> None:
    async with delivering() as parts:
        await parts.reject(record(b"junk"), MALFORMED, dead_letter=True)
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert letter.movable
        assert parts.sink.timeouts[-1] == (TOPICS.dead_letters, None)


async def test_a_record_whose_dead_letter_is_refused_altogether_is_finished_and_logged() -> None:
    async with delivering(refusing(InvalidTimestampError(), TOPICS.dead_letters)) as parts:
        with structlog.testing.capture_logs() as logs:
            await parts.reject(record(b"junk"), MALFORMED, dead_letter=True)
        assert parts.sink.events == [TOPICS.results, 7]
        refused = {
            "event": "dead_letter_refused",
            "record": "t.jobs-3-7",
            "reasons": ["INVALID_TIMESTAMP"] * 3,
        }
        assert logs == [refused | {"log_level": "error"}]


async def test_what_an_operator_reads_of_an_address_that_took_nothing() -> None:
    reason = Undelivered(
        "for 15 s they took no record: the brokers have no leader for the partition (LEADER_NOT_AVAILABLE)"
    )
    async with delivering(refusing(reason, "elsewhere")) as parts:
        await parts.deliver(answered(ELSEWHERE))
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert value_of(letter.headers, "embedq-error-message") == (
            b"header `reply-topic`: expected a topic and partition that take results; for 15 s they took no record: the "
            b"brokers have no leader for the partition (LEADER_NOT_AVAILABLE)"
        )


# -- the rest -----------------------------------------------------------------------------------------------------------


async def test_closing_ends_the_threads() -> None:
    async with delivering() as parts:
        threads = [await parts.deliverer.in_thread(lane, threading.current_thread) for lane in LANES]
    assert threads[0] is not threads[1]
    assert not any(thread.is_alive() for thread in threads)


async def test_topics_are_those_of_the_sink() -> None:
    async with delivering() as parts:
        parts.sink.new_topics["new"] = 2
        assert parts.deliverer.partitions("new") is None
        await parts.deliverer.refresh_topics()
        assert parts.deliverer.partitions("new") == 2


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ([("kafka_replyTopic", b"theirs"), ("kafka_replyPartition", b"\0\0\0\1")], "kafka_replyTopic"),
        ([("REPLY_TOPIC", b"theirs")], "REPLY_TOPIC"),
        ([("reply-partition", b"\0\0\0\1")], "reply-partition"),
        ([], None),
    ],
)
def test_an_address_that_takes_nothing_is_named_by_the_header_that_it_came_in(
    headers: list[tuple[str, bytes]], named: str | None
) -> None:
    for reason in (Undelivered("for 15 s they took no record"), TopicAuthorizationFailedError()):
        error = undeliverable(reason, parse(headers))
        assert error.param == named
        assert error.message.startswith("the results topic: " if named is None else f"header `{named}`: ")
