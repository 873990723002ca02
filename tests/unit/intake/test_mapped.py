"""Records that a mapping reads, at the service's door."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition

from embedq_consumer.group import Ticket
from embedq_consumer.intake.admission import Admitted, DeletedRow, Rejection, UnknownSchema
from embedq_consumer.intake.jobs import JobState
from embedq_consumer.intake.records import Record, mapped
from embedq_consumer.retries import Past
from embedq_consumer.shapes import FlatAnswer, Mappings
from embedq_consumer.shapes.registry.schemas import Fetch, Registration
from embedq_shared.messages import ErrorBody
from tests.helpers.in_flight import MODELS, NOW_MS, PARTITIONS, TOPICS, record, rules
from tests.helpers.shapes import mappings_of

MAPPINGS = mappings_of(
    rows={"topics": ["shop.rows"], "id": "id", "columns": ["n"]},
    loose={"topics": ["shop.loose"], "ordered": False},
    batch={"topics": ["shop.batch"], "shape": "openai-batch"},
    named={"options": {"dimensions": 64}},
)


def on(topic: str, value: Any, *headers: tuple[str, bytes], key: bytes | None = None) -> Record:
    found = record(json.dumps(value).encode(), *headers, key=key)
    return msgspec.structs.replace(found, ticket=Ticket(TopicPartition(topic, 1), 1, 7), lane="bulk")


def admit(one: Record, mappings: Mappings = MAPPINGS, **settings: Any) -> Admitted:
    return rules(mappings=mappings, **settings).admit(one, MODELS, NOW_MS, PARTITIONS.get)


def error(found: Admitted) -> ErrorBody:
    assert isinstance(found, Rejection)
    return found.error


def test_a_row_of_a_mappings_topic_is_a_job_with_an_answer_of_its_own() -> None:
    found = admit(on("shop.rows", {"id": 5, "text": "hello", "n": 1}))
    assert isinstance(found, JobState)
    assert (found.request.texts, found.request.id, found.request.listed) == (["hello"], "5", False)
    assert isinstance(found.request.answer, FlatAnswer)


def test_a_row_has_no_caller_whatever_its_headers_say() -> None:
    copied = [
        ("REPLY_TOPIC", b"nowhere"),
        ("deadline", b"1"),
        ("reply-partition", b"?"),
        ("correlation-id", b"c"),
    ]
    found = admit(on("shop.rows", {"id": 5, "text": "hello"}, *copied))
    assert isinstance(found, JobState)
    assert (found.headers.reply_topic, found.headers.deadline_ms) == (None, None)
    assert found.headers.echo == (("correlation-id", b"c"),)


def test_a_record_on_a_job_topic_may_name_its_mapping() -> None:
    found = admit(
        on(TOPICS.jobs, {"text": "hello"}, ("embedq-mapping", b"named"), ("reply-topic", b"elsewhere"))
    )
    assert isinstance(found, JobState)
    assert (found.request.dimensions, found.headers.reply_topic) == (64, "elsewhere")


def test_a_mapping_that_is_not_there_is_refused_and_those_that_are_there_are_named() -> None:
    for mappings, names in (
        (MAPPINGS, "batch, loose, named, rows"),
        (Mappings(), "EMBEDQ_MAPPINGS` is empty"),
    ):
        found = admit(on(TOPICS.jobs, {"text": "hello"}, ("embedq-mapping", b"\xffx")), mappings)
        assert isinstance(found, Rejection)
        assert (found.error.code, found.error.param, found.dead_letter) == (
            "invalid_header",
            "embedq-mapping",
            True,
        )
        assert names in found.error.message


def test_a_bad_row_is_a_dead_letter_that_names_mapping_and_field() -> None:
    found = admit(on("shop.rows", {"id": 5}))
    assert isinstance(found, Rejection)
    assert found.error.message.startswith("mapping rows: `text`: expected")
    assert (found.envelope.id, found.dead_letter) == ("5", True)


def test_a_bad_line_of_a_batch_is_answered_and_buried_no_more_than_a_bad_job_is() -> None:
    found = admit(on("shop.batch", {"custom_id": "c", "body": {"input": 1}}))
    assert isinstance(found, Rejection)
    assert (found.envelope.id, found.dead_letter, found.answer is None) == ("c", False, False)


def test_a_deleted_row_is_no_job() -> None:
    found = admit(msgspec.structs.replace(on("shop.rows", None, key=b"5"), value=None))
    assert isinstance(found, DeletedRow)
    assert found.removal.key == b"5"


def test_options_that_the_model_does_not_take_refuse_the_row() -> None:
    found = admit(
        on("shop.rows", {"id": 1, "text": "t"}),
        mappings_of(rows={"topics": ["shop.rows"], "options": {"dimensions": 512}}),
    )
    assert error(found).param == "dimensions"


def test_a_result_that_no_record_holds_is_refused_before_it_is_computed() -> None:
    big = {"id": 1, "text": "t", "n": "x" * 10_000}
    assert isinstance(admit(on("shop.rows", big)), JobState)
    assert error(admit(on("shop.rows", big), max_result_bytes=10_000)).code == "result_too_large"
    line = {"custom_id": "c", "body": {"input": ["a"] * 300}}
    found = admit(on("shop.batch", line))
    assert error(found).code == "result_too_large"
    assert "encoding_format` base64" in error(found).message
    line["body"]["encoding_format"] = "base64"  # type: ignore[index]
    assert isinstance(admit(on("shop.batch", line)), JobState)


def test_a_schema_that_is_not_known_yet_is_asked_for() -> None:
    class Asking:
        def reader(self, want: Fetch) -> None:
            return None

        def number(self, want: Registration) -> None:
            return None

    one = msgspec.structs.replace(on("shop.rows", None), value=b"\x00\x00\x00\x00\x07x")
    assert admit(one, schemas=Asking()) == UnknownSchema(Fetch(7))


@pytest.mark.parametrize("topic", ["shop.rows", TOPICS.jobs])
def test_a_record_that_was_given_up_goes_to_no_address_that_a_row_copied(topic: str) -> None:
    policy = rules(mappings=MAPPINGS)
    one = on(topic, {"id": 5}, ("reply-topic", b"elsewhere"))
    addressed = policy.given_up(one, ErrorBody.of("internal", "x")).headers.reply_topic
    condemned = policy.condemn(one, [], PARTITIONS.get).headers.reply_topic
    assert addressed == condemned == (None if topic == "shop.rows" else "elsewhere")


def test_rows_of_a_mapping_are_one_client_and_keep_the_order_of_their_keys() -> None:
    row = mapped(on("shop.rows", {}, ("client-id", b"whoever"), key=b"k"), MAPPINGS)
    assert (row.client, row.ordered) == (b"map rows", True)
    assert not mapped(on("shop.rows", {}), MAPPINGS).ordered, "without a key there is no order to keep"
    assert not mapped(on("shop.loose", {}, key=b"k"), MAPPINGS).ordered
    assert not mapped(on("shop.batch", {}, key=b"k"), MAPPINGS).ordered
    job = on(TOPICS.jobs, {}, key=b"k")
    assert mapped(job, MAPPINGS) is job


def test_a_row_that_is_run_again_is_its_mappings_still() -> None:
    past = Past(topic="shop.rows", partition=1, offset=3, timestamp_ms=1, timestamp_type=0)
    again = msgspec.structs.replace(on(TOPICS.retry(1), {"id": 5, "text": "t"}), past=past)
    assert mapped(again, MAPPINGS).client == b"map rows"
    found = admit(again)
    assert isinstance(found, JobState)
    assert found.request.answer is not None
