"""The AsyncAPI document, which is kept by hand, says what the code says."""

from __future__ import annotations

import base64
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from embedq_shared import codec, topics
from embedq_shared.messages import ResultStatus
from embedq_shared.topics import Topics
from embedq_shared.vectors import quantize
from tests.helpers.asyncapi import DOCUMENT, MESSAGES, resolve


def header_names(name: str) -> set[str]:
    """Every header that a message's schema names."""
    headers = resolve(MESSAGES[name]["headers"])
    return {field for part in [headers, *headers.get("allOf", [])] for field in part.get("properties", {})}


# -- shapes and examples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_the_examples_of_a_message_fit_it(name: str) -> None:
    message = resolve(MESSAGES[name])
    Draft202012Validator.check_schema(message["payload"])
    Draft202012Validator.check_schema(message.get("headers", {}))
    for example in message.get("examples", []):
        Draft202012Validator(message["payload"]).validate(example["payload"])
        Draft202012Validator(message.get("headers", {})).validate(example.get("headers", {}))


@pytest.mark.parametrize("stem", ["job", "result", "failure", "control", "split", "status"])
def test_a_message_has_the_shape_that_is_generated_from_the_code(stem: str) -> None:
    assert MESSAGES[stem]["payload"] == {"$ref": f"./{stem}.schema.json"}


def test_the_job_examples_are_jobs() -> None:
    examples = MESSAGES["job"]["examples"]
    assert len(examples) >= 2
    for example in examples:
        codec.decode_job(msgspec.json.encode(example["payload"]), "json")


def test_the_int8_example_is_a_unit_vector() -> None:
    payload = MESSAGES["result"]["examples"][0]["payload"]
    first = payload["data"][0]
    stored = np.frombuffer(base64.b64decode(first["embedding"]), dtype=np.int8).astype(np.float64)
    assert len(stored) == payload["dimensions"]
    assert np.linalg.norm(stored * first["scale"]) == pytest.approx(1, abs=0.02)
    again, _ = quantize((stored * first["scale"]).astype(np.float32), "int8")
    assert again == stored.astype(np.int8).tobytes()


# -- names ------------------------------------------------------------------------------------------------------------


def test_every_topic_is_a_channel_and_every_channel_has_an_operation() -> None:
    channels = DOCUMENT["channels"]
    default = Topics()
    own = {*default.lanes, default.results, default.replies, default.control, default.status}
    assert {channel["address"] for channel in channels.values()} == {*own, default.dead_letters, None}
    used = {operation["channel"]["$ref"].split("/")[-1] for operation in DOCUMENT["operations"].values()}
    assert used == channels.keys() - {"replyAddress"}


def test_the_consumer_group_is_the_default_one() -> None:
    for name in ("receiveJob", "receiveBulkJob"):
        assert DOCUMENT["operations"][name]["bindings"]["kafka"]["groupId"]["enum"] == [topics.GROUP]


@pytest.mark.parametrize("name", ["job", "jobMsgpack"])
def test_a_jobs_headers_are_those_that_the_service_reads(name: str) -> None:
    families = (*topics.CORRELATION, *topics.REPLY_TOPIC, *topics.REPLY_PARTITION, *topics.TRACE)
    assert header_names(name) == {*families, topics.DEADLINE, topics.CLIENT, topics.CONTENT_TYPE}


@pytest.mark.parametrize("name", ["result", "resultMsgpack", "failure", "failureMsgpack"])
def test_a_results_headers_are_those_that_the_service_writes(name: str) -> None:
    echoed = {*topics.CORRELATION, *topics.TRACE}
    assert header_names(name) == {*echoed, topics.CONTENT_TYPE, topics.STATUS, topics.MODEL_VERSION}


def test_content_types_and_statuses_are_those_of_the_code() -> None:
    def own(name: str) -> Any:
        return MESSAGES[name]["headers"]["allOf"][1]["properties"]

    assert own("job")["content-type"]["const"] == topics.JSON
    assert set(own("jobMsgpack")["content-type"]["enum"]) == topics.MSGPACK_TYPES
    for name in ("resultMsgpack", "failureMsgpack"):
        assert own(name)["content-type"]["const"] == MESSAGES[name]["contentType"] == topics.MSGPACK
    assert set(own("result")["embedq-status"]["enum"]) == set(get_args(ResultStatus))


def test_jobs_are_correlated_and_answered_where_their_headers_say() -> None:
    job = resolve(MESSAGES["job"])
    assert job["correlationId"]["location"] == f"$message.header#/{topics.CORRELATION[0]}"
    for name in ("receiveJob", "receiveBulkJob"):
        reply = DOCUMENT["operations"][name]["reply"]
        assert reply["address"]["location"] == f"$message.header#/{topics.REPLY_TOPIC[0]}"
    assert DOCUMENT["channels"]["replyAddress"]["address"] is None
