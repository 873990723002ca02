"""A bulk job whose fault may heal waits in a retry topic instead of being answered; nobody else's answer changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import InvalidTopicError, MessageSizeTooLargeError, TopicAuthorizationFailedError

from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits
from embedq_consumer.delivery.destination import Undelivered
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.group import Ticket
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.jobs import InputVector, JobState
from embedq_consumer.intake.records import run_before
from embedq_consumer.retries import RetryPolicy, RetryTiers, Tier, past_of
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.codec import Envelope
from embedq_shared.headers import Header, JobHeaders, value_of
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import Lane
from tests.helpers.fake_parts import ScriptedSink
from tests.helpers.in_flight import MODELS, NOW_MS, PARTITIONS, TOPICS, admitted, record, rules
from tests.helpers.metric_values import sample_value

ELSEWHERE = ("reply-topic", b"elsewhere")
INTERNAL = ErrorBody.of("internal", "`input`: the model could not run this input", "input")
TOO_LONG = ErrorBody.of("text_too_long", "`input`: expected less", "input")
SILENT = Undelivered("for 15 s they took no record")
FIRST, SECOND = (
    Tier(number=number, topic=TOPICS.retry(number), delay_s=delay, partitions=2)
    for number, delay in ((1, 30.0), (2, 300.0))
)
TIERS = RetryTiers(tiers=(FIRST, SECOND))


class Parts:
    def __init__(self, refused: dict[str, Exception]) -> None:
        self.metrics = Metrics()
        self.refused = refused
        self.sink = ScriptedSink(lambda record: self.refused.get(record.topic))
        policy = RetryPolicy(TIERS)
        encoder = ResultEncoder(TOPICS, "group", 900_000, replica="r0", retries=policy)
        limits = DeliveryLimits(reply_timeout_s=15, holds_back=lambda record: False)
        self.deliverer = Deliverer(encoder, self.sink, self.sink.finish, self.metrics, limits)

    async def deliver(self, *jobs: JobState) -> None:
        await self.deliverer.deliver(jobs)

    @property
    def topics(self) -> list[str]:
        return [record.topic for record in self.sink.sent]

    def sample(self, name: str, **labels: str) -> float | None:
        return sample_value(self.metrics.registry, f"embedq_{name}", labels)


@asynccontextmanager
async def delivering(
    refused: Mapping[str, Exception] = MappingProxyType({}),
) -> AsyncIterator[Parts]:
    """`refused`: why the brokers take nothing for these topics."""
    parts = Parts(dict(refused))
    try:
        yield parts
    finally:
        await asyncio.to_thread(parts.deliverer.close)


def on(job: JobState, topic: str, lane: Lane) -> JobState:
    """The job of a record of this topic."""
    ticket = Ticket(TopicPartition(topic, 3), 1, 7)
    job.record = msgspec.structs.replace(job.record, ticket=ticket, lane=lane)
    return job


def ended(
    *outcomes: ErrorBody | None, headers: tuple[Header, ...] = (), lane: Lane = "bulk", **fields: Any
) -> JobState:
    """A bulk job; the outcome of each of its inputs is a vector or an error."""
    inputs = "a" if len(outcomes) == 1 else [f"text {number}" for number in range(len(outcomes))]
    job = admitted(*headers, **{"input": inputs, "dimensions": 32, **fields})
    for index, outcome in enumerate(outcomes):
        job.settle(index, outcome or InputVector(b"\0" * 128, 3, None, None, cached=False))
    return on(job, TOPICS.bulk if lane == "bulk" else TOPICS.jobs, lane)


def read_again(sent: Outgoing, partition: int, offset: int, *outcomes: ErrorBody | None) -> JobState:
    """The job of a record that was sent to a retry topic, run once more."""
    raw = record(sent.value, *sent.headers, key=sent.key, timestamp_ms=1)
    ticket = Ticket(TopicPartition(sent.topic, partition), 1, offset)
    found = run_before(msgspec.structs.replace(raw, ticket=ticket, lane="bulk"))
    job = rules().admit(found, MODELS, NOW_MS, PARTITIONS.get)
    assert isinstance(job, JobState)
    for index, outcome in enumerate(outcomes):
        job.settle(index, outcome or InputVector(b"\0" * 128, 3, None, None, cached=False))
    return job


# -- what is run again ------------------------------------------------------------------------------------------------------


async def test_an_error_that_may_heal_sends_the_job_to_the_first_tier_and_finishes_its_record_after_that() -> (
    None
):
    async with delivering() as parts:
        before_ms = int(time.time() * 1000)
        own = (("correlation-id", b"c"), ("embedq-attempt", b"9"))
        await parts.deliver(ended(INTERNAL, headers=own, id="j"))
        assert parts.sink.events == [FIRST.topic, 7]
        [sent] = parts.sink.sent
        assert json.loads(sent.value or b"")["id"] == "j"
        assert (sent.partition, sent.movable, sent.timestamp_ms) == (1, True, None)
        past, headers = past_of(sent.headers)
        assert headers == own
        assert past is not None
        assert (past.topic, past.partition, past.offset) == (TOPICS.bulk, 3, 7)
        assert past.timestamp_ms == 1_700_000_000_000
        [attempt] = past.attempts
        assert (attempt.replica, attempt.code, attempt.message) == ("r0", "internal", INTERNAL.message)
        assert value_of(sent.headers, "embedq-attempt") == b"2"
        assert value_of(sent.headers, "embedq-reason") == b"internal"
        assert int(value_of(sent.headers, "embedq-due") or b"") - before_ms >= 30_000


async def test_a_job_that_waits_is_counted_by_tier_and_reason_and_not_as_answered() -> None:
    async with delivering() as parts:
        assert parts.sample("retries_total", tier="2", reason="undeliverable") == 0
        await parts.deliver(ended(INTERNAL), ended(None))
        assert parts.sample("retries_total", tier="1", reason="internal") == 1
        assert parts.sample("jobs_total", lane="bulk", status="error") == 0
        assert parts.sample("jobs_total", lane="bulk", status="ok") == 1
        assert parts.sample("errors_total", code="internal") == 0
        assert parts.sample("job_seconds_count", lane="bulk") == 1


async def test_a_result_that_its_address_does_not_take_is_run_again_instead_of_becoming_an_error() -> None:
    async with delivering({"elsewhere": SILENT}) as parts:
        await parts.deliver(ended(None, headers=(ELSEWHERE,)))
        assert parts.sink.events == [FIRST.topic, 7]
        assert parts.sample("retries_total", tier="1", reason="undeliverable") == 1
        assert parts.sample("dead_letters_total", code="undeliverable") == 0


async def test_a_job_that_heals_is_answered_under_its_own_name_at_its_own_address() -> None:
    async with delivering({"elsewhere": SILENT}) as parts:
        await parts.deliver(ended(None, headers=(ELSEWHERE,)))
        parts.refused.clear()
        [waiting] = parts.sink.sent
        again = read_again(waiting, 1, 50, None)
        assert again.record.name == f"{TOPICS.bulk}-3-7"
        assert again.record.headers == (ELSEWHERE,)
        assert again.record.timestamp_ms == 1_700_000_000_000
        await parts.deliver(again)
        assert parts.sink.events == [FIRST.topic, 7, "elsewhere", 50]


async def test_a_job_that_never_heals_ends_in_the_dead_letters_with_all_of_its_runs() -> None:
    async with delivering({"elsewhere": SILENT}) as parts:
        await parts.deliver(ended(None, headers=(ELSEWHERE,)))
        await parts.deliver(read_again(parts.sink.sent[-1], 1, 50, INTERNAL))
        await parts.deliver(read_again(parts.sink.sent[-1], 0, 60, None))
        assert parts.topics == [FIRST.topic, SECOND.topic, TOPICS.results, TOPICS.dead_letters]
        [error] = parts.sink.to(TOPICS.results)
        assert json.loads(error.value or b"")["id"] == f"{TOPICS.bulk}-3-7"
        [letter] = parts.sink.to(TOPICS.dead_letters)
        assert letter.timestamp_ms == 1_700_000_000_000
        said = dict(letter.headers)
        assert said["kafka_dlt-original-topic"] == TOPICS.bulk.encode()
        assert said["kafka_dlt-original-offset"] == (7).to_bytes(8, "big")
        assert said["__connect.errors.partition"] == b"3"
        assert said["embedq-attempts"] == b"3"
        runs = json.loads(said["embedq-retries"])
        assert [run["code"] for run in runs] == ["undeliverable", "internal"]
        assert int(said["embedq-first-seen"]) <= runs[0]["at"]
        assert parts.sample("dead_letters_total", code="undeliverable") == 1
        assert parts.sample("jobs_total", lane="bulk", status="error") == 1


async def test_an_error_of_the_service_that_no_tier_heals_is_kept_for_a_person_to_look_at() -> None:
    async with delivering() as parts:
        await parts.deliver(ended(INTERNAL))
        await parts.deliver(read_again(parts.sink.sent[-1], 1, 50, INTERNAL))
        await parts.deliver(read_again(parts.sink.sent[-1], 1, 60, INTERNAL))
        assert parts.topics == [FIRST.topic, SECOND.topic, TOPICS.results, TOPICS.dead_letters]


async def test_a_job_that_holds_up_its_partition_is_run_again_too() -> None:
    async with delivering() as parts:
        found = on(ended(INTERNAL), TOPICS.bulk, "bulk").record
        rejection = Rejection(
            error=INTERNAL, format="json", headers=JobHeaders(), envelope=Envelope(), dead_letter=True
        )
        await parts.deliverer.reject([(found, rejection)])
        assert parts.sink.events == [FIRST.topic, 7]


# -- what is answered at once -----------------------------------------------------------------------------------------------


async def test_an_interactive_job_is_answered_at_once() -> None:
    async with delivering({"elsewhere": SILENT}) as parts:
        await parts.deliver(ended(INTERNAL, lane="interactive"))
        await parts.deliver(ended(None, headers=(ELSEWHERE,), lane="interactive"))
        assert parts.topics == [TOPICS.results, TOPICS.results, TOPICS.dead_letters]


async def test_the_senders_fault_is_answered_at_once() -> None:
    async with delivering({"elsewhere": InvalidTopicError()}) as parts:
        await parts.deliver(ended(TOO_LONG))
        await parts.deliver(ended(None, headers=(ELSEWHERE,)))
        assert parts.topics == [TOPICS.results, TOPICS.results, TOPICS.dead_letters]
        assert parts.sample("retries_total", tier="1", reason="undeliverable") == 0


async def test_a_list_with_at_least_one_vector_is_answered_at_once() -> None:
    async with delivering() as parts:
        await parts.deliver(ended(None, INTERNAL))
        assert parts.sample("jobs_total", lane="bulk", status="partial") == 1
        await parts.deliver(ended(TOO_LONG, INTERNAL))
        assert parts.topics == [TOPICS.results, FIRST.topic]


async def test_a_job_whose_deadline_comes_before_the_tier_is_answered_at_once() -> None:
    async with delivering() as parts:
        for left_s, topic in ((20, TOPICS.results), (90, FIRST.topic)):
            job = ended(INTERNAL)
            job.headers = JobHeaders(deadline_ms=int((time.time() + left_s) * 1000))
            await parts.deliver(job)
            assert parts.topics[-1] == topic


@pytest.mark.parametrize("reason", [MessageSizeTooLargeError(), TopicAuthorizationFailedError(), SILENT])
async def test_a_job_that_its_retry_topic_does_not_take_is_answered_as_if_there_were_none(
    reason: Exception,
) -> None:
    async with delivering({"elsewhere": SILENT, FIRST.topic: reason}) as parts:
        with structlog.testing.capture_logs() as logs:
            await parts.deliver(ended(INTERNAL))
        assert [entry["event"] for entry in logs] == ["retry_refused"]
        assert parts.sink.events == [TOPICS.results, 7]
        assert (FIRST.topic, 15) in parts.sink.timeouts, "else it would wait for a topic that is gone"
        await parts.deliver(ended(None, headers=(ELSEWHERE,)))
        assert parts.topics == [TOPICS.results, TOPICS.results, TOPICS.dead_letters]
        assert parts.sample("retries_total", tier="1", reason="internal") == 0
        assert parts.sample("jobs_total", lane="bulk", status="error") == 2


async def test_an_error_that_neither_its_retry_topic_nor_its_address_takes_is_said_on_the_results_topic() -> (
    None
):
    async with delivering({"elsewhere": SILENT, FIRST.topic: SILENT}) as parts:
        job = ended(INTERNAL, headers=(ELSEWHERE,))
        await parts.deliver(job)
        assert parts.topics == [TOPICS.results, TOPICS.dead_letters]
        [error] = parts.sink.to(TOPICS.results)
        assert json.loads(error.value or b"")["error"]["code"] == "undeliverable"


# -- hostile headers --------------------------------------------------------------------------------------------------------


async def test_what_a_sender_says_of_attempts_neither_skips_nor_adds_a_tier() -> None:
    async with delivering() as parts:
        await parts.deliver(ended(INTERNAL))
        forged = tuple(parts.sink.sent[-1].headers)
        await parts.deliver(ended(INTERNAL, headers=forged))
        past, own = past_of(parts.sink.sent[-1].headers)
        assert parts.topics == [FIRST.topic, FIRST.topic]
        assert past is not None
        assert (len(past.attempts), own) == (1, forged)
