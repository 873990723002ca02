"""Answers of mapped records: where they go, by which key, and in what order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import MessageSizeTooLargeError

from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.places import Places
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.group import Ticket
from embedq_consumer.intake.admission import DeletedRow, Rejection
from embedq_consumer.intake.jobs import InputVector, JobState
from embedq_consumer.intake.key_order import KeyOrder
from embedq_consumer.intake.records import Record, mapped
from embedq_consumer.retries import RetryPolicy, RetryTiers, Tier
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.headers import value_of
from embedq_shared.kafka import partition_of
from embedq_shared.messages import ErrorBody
from tests.helpers.fake_parts import ScriptedSink
from tests.helpers.in_flight import MODELS, NOW_MS, PARTITIONS, TOPICS, VERSION, record, rules
from tests.helpers.shapes import mappings_of

MAPPINGS = mappings_of(
    rows={"topics": ["shop.rows"], "id": "id"}, batch={"topics": ["shop.batch"], "shape": "openai-batch"}
)
INTERNAL = ErrorBody.of("internal", "`input`: the model could not run this input", "input")
OUT, BATCH = "rows.vectors", "batch.vectors"
RETRY = RetryPolicy(RetryTiers(tiers=(Tier(number=1, topic=TOPICS.retry(1), delay_s=1.0),)))
Offset = int


class Parts:
    """A deliverer, and the order of keys as the intake keeps it."""

    def __init__(self, refusal: Callable[[Outgoing], Exception | None] = lambda record: None) -> None:
        self.epochs = {TopicPartition("shop.rows", 1): 1, TopicPartition("shop.batch", 1): 1}
        self.order = KeyOrder(self.epochs.get)
        self.sink = ScriptedSink(refusal)
        self.metrics = Metrics()
        encoder = ResultEncoder(TOPICS, "group", 900_000, replica="r0", retries=RETRY)
        limits = DeliveryLimits(reply_timeout_s=15)
        self.deliverer = Deliverer(
            encoder, self.sink, self.finish, self.metrics, limits, when_first=self.when_first
        )

    def when_first(self, found: Record, go: Callable[[bool], None]) -> None:
        self.order.when_first(found.ticket, go)

    def finish(self, *records: Record) -> None:
        self.sink.finish(*records)
        for one in records:
            self.order.finish(one.ticket)

    def polled(
        self, offset: Offset, value: Any, *, key: bytes | None = b"5", topic: str = "shop.rows"
    ) -> Record:
        found = record(
            None if value is None else json.dumps(value).encode(), ("correlation-id", b"c"), key=key
        )
        ticket = Ticket(TopicPartition(topic, 1), 1, offset)
        found = mapped(msgspec.structs.replace(found, ticket=ticket, lane="bulk"), MAPPINGS)
        if found.ordered and found.key is not None:
            self.order.begin(ticket, found.key)
        return found

    def admitted(self, found: Record) -> JobState | DeletedRow | Rejection:
        got = rules(mappings=MAPPINGS).admit(found, MODELS, NOW_MS, PARTITIONS.get)
        assert isinstance(got, JobState | DeletedRow | Rejection)
        return got

    async def answer(self, found: Record, outcome: ErrorBody | None = None) -> None:
        """Answer a record, each of its inputs with a vector or this error."""
        match self.admitted(found):
            case JobState() as job:
                for index in range(len(job.outcomes)):
                    job.settle(index, outcome or InputVector(b"\0" * 1024, 3, None, None, cached=False))
                await self.deliverer.deliver([job])
            case DeletedRow() as row:
                await self.deliverer.remove([(found, row)])
            case Rejection() as rejection:
                await self.deliverer.reject([(found, rejection)])

    async def close(self) -> None:
        await asyncio.to_thread(self.deliverer.close)


async def test_a_rows_result_goes_to_the_mappings_topic_by_its_id() -> None:
    parts = Parts()
    await parts.answer(parts.polled(7, {"id": 5, "text": "hello"}))
    [sent] = parts.sink.sent
    assert (sent.topic, sent.key, sent.partition, sent.movable) == (OUT, b"5", None, False)
    value = json.loads(sent.value or b"")
    assert (value["id"], value["model_version"], len(value["vector"])) == (5, VERSION, 256)
    assert dict(sent.headers) == {
        "correlation-id": b"c",
        "content-type": b"application/json",
        "embedq-status": b"ok",
        "embedq-model-version": VERSION.encode(),
    }
    assert parts.sink.finished == [7]
    await parts.close()


async def test_a_deleted_rows_answer_is_a_tombstone() -> None:
    parts = Parts()
    await parts.answer(parts.polled(7, None))
    [sent] = parts.sink.sent
    assert (sent.topic, sent.key, sent.value, sent.movable) == (OUT, b"5", None, False)
    assert parts.sink.finished == [7]
    await parts.close()


async def test_a_row_that_fails_is_an_error_for_the_results_topic_and_a_dead_letter() -> None:
    for value, outcome, code in (
        ({"id": 5, "text": "t"}, ErrorBody.of("text_too_long", "`input`: x", "input"), "text_too_long"),
        ({"id": 5, "text": "t"}, INTERNAL, "internal"),
        ({"id": 5}, None, "invalid_value"),
    ):
        parts = Parts()
        await parts.answer(parts.polled(7, value), outcome)
        failure, letter = parts.sink.sent
        assert (failure.topic, letter.topic) == (TOPICS.results, TOPICS.dead_letters)
        error = json.loads(failure.value or b"")["error"]
        assert (error["code"], error["param"]) == (code, "text")
        assert error["message"].startswith("mapping rows: ")
        assert value_of(letter.headers, "kafka_dlt-original-topic") == b"shop.rows"
        assert parts.sink.finished == [7]
        await parts.close()


async def test_a_row_without_a_key_is_run_again() -> None:
    parts = Parts()
    await parts.answer(parts.polled(7, {"id": 5, "text": "t"}, key=None), INTERNAL)
    assert [sent.topic for sent in parts.sink.sent] == [TOPICS.retry(1)]
    await parts.close()


async def test_a_batch_line_is_answered_with_a_line_whatever_becomes_of_it() -> None:
    for body, outcome, status in (
        ({"input": ["a", "b"], "encoding_format": "base64"}, None, 200),
        ({"input": ["a", "b"]}, ErrorBody.of("non_finite", "x", "input[0]"), 500),
        ({"input": "a", "model": "text-embedding-3-small"}, None, 404),
        ({"input": 3}, None, 400),
    ):
        parts = Parts()
        line = {"custom_id": "c-1", "body": body}
        await parts.answer(parts.polled(7, line, topic="shop.batch"), outcome)
        [sent] = parts.sink.sent
        assert (sent.topic, sent.key) == (BATCH, b"c-1")
        found = json.loads(sent.value or b"")
        assert (found["custom_id"], found["response"]["status_code"]) == ("c-1", status)
        await parts.close()


async def test_a_result_that_the_output_topic_refuses_is_told_of_elsewhere() -> None:
    parts = Parts(lambda sent: MessageSizeTooLargeError() if sent.topic == OUT else None)
    await parts.answer(parts.polled(7, {"id": 5, "text": "t"}))
    assert [sent.topic for sent in parts.sink.sent][-2:] == [TOPICS.results, TOPICS.dead_letters]
    assert parts.sink.finished == [7]
    await parts.close()


async def test_a_deleted_row_does_not_come_back_because_its_text_took_longer() -> None:
    parts = Parts()
    first, gone, other = (
        parts.polled(1, {"id": 5, "text": "long"}),
        parts.polled(2, None),
        parts.polled(3, {"id": 6, "text": "x"}, key=b"6"),
    )
    waiting = asyncio.create_task(parts.answer(gone))
    await parts.answer(other)
    assert [sent.key for sent in parts.sink.sent] == [b"6"], "other keys wait for nobody"
    await parts.answer(first)
    await waiting
    assert [(sent.key, sent.value is None) for sent in parts.sink.sent[1:]] == [(b"5", False), (b"5", True)]
    assert parts.sink.finished == [3, 1, 2]
    await parts.close()


async def test_two_rows_of_one_key_in_one_delivery_go_one_after_the_other() -> None:
    parts = Parts()
    jobs = []
    for offset in (1, 2):
        job = parts.admitted(parts.polled(offset, {"id": 5, "text": f"version {offset}"}))
        assert isinstance(job, JobState)
        job.settle(0, InputVector(b"\0" * 1024, offset, None, None, cached=False))
        jobs.append(job)
    await parts.deliverer.deliver(jobs[::-1])
    assert parts.sink.finished == [1, 2]
    await parts.close()


async def test_the_answer_of_a_partition_that_went_is_not_sent() -> None:
    parts = Parts()
    found = parts.polled(1, {"id": 5, "text": "old"})
    parts.epochs[TopicPartition("shop.rows", 1)] = 2
    parts.order.follow()
    await parts.answer(found)
    assert parts.sink.sent == []
    assert parts.sink.finished == [1]
    await parts.close()


def test_a_result_by_key_waits_for_its_partition_and_takes_no_other() -> None:
    places = Places({OUT: 8}.get, max_held=10, now=0.0)
    sent = Outgoing(topic=OUT, partition=None, key=b"5", value=b"x", headers=[], by_key=True)
    movable = msgspec.structs.replace(sent, by_key=False)
    wanted = (OUT, partition_of(b"5", 8))
    places.at(wanted).failing_since = 0.0
    places.at(wanted)._retry_at = 1000.0
    assert places.wanted([sent]) == [wanted[1]]
    assert places.destination_of(sent, wanted[1], 100.0).place == wanted
    assert places.destination_of(movable, wanted[1], 100.0).place != wanted
