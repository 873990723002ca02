"""OpenAI's interface: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_shared.headers import MAX_CLIENT_BYTES
from embedq_shared.messages import ErrorBody
from tests.helpers.fake_gateway import MAX_TOKENS, Door, a_gateway
from tests.helpers.fake_service import HIDDEN_SIZE, NEW, OLD, Answer, Received, changed, expected


async def embeddings(door: Door, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = await door.post("/v1/embeddings", body, **headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(door: Door, body: Any, status: int, **headers: str) -> dict[str, Any]:
    answer = await door.post("/v1/embeddings", body, **headers)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def test_a_text_gets_its_vector_in_openais_shape(door: Door) -> None:
    found = await embeddings(door, {"input": "the tide turns", "model": "default"})
    assert found == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": found["data"][0]["embedding"]}],
        "model": "default",
        "model_version": OLD,
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    vector = np.array(found["data"][0]["embedding"], dtype=np.float32)
    assert vector.tobytes() == expected("the tide turns").tobytes()


async def test_a_list_gets_its_vectors_in_its_order(door: Door) -> None:
    texts = [f"text {n}" for n in range(40)]
    found = await embeddings(door, {"input": texts})
    assert [each["index"] for each in found["data"]] == list(range(40))
    for text, each in zip(texts, found["data"], strict=True):
        assert np.array(each["embedding"], dtype=np.float32).tobytes() == expected(text).tobytes()


async def test_numbers_have_the_fewest_digits_that_read_back_the_same(door: Door) -> None:
    answer = await door.post("/v1/embeddings", {"input": "a"})
    written = answer.text.partition('"embedding":[')[2].partition("]")[0].split(",")
    assert [float(each) for each in written] == [float(str(x)) for x in expected("a")]
    assert max(map(len, written)) <= len("-1.2345678e-05")


async def test_base64_is_the_vector_to_the_last_bit(door: Door) -> None:
    found = await embeddings(door, {"input": ["a", "b"], "encoding_format": "base64"})
    raw = [base64.b64decode(each["embedding"], validate=True) for each in found["data"]]
    assert raw == [expected("a").astype("<f4").tobytes(), expected("b").astype("<f4").tobytes()]


@pytest.mark.parametrize(("dtype", "kind"), [("int8", int), ("binary", int), ("float16", float)])
async def test_other_dtypes_are_written_as_the_contract_has_them(door: Door, dtype: str, kind: type) -> None:
    found = await embeddings(door, {"input": "a b", "dtype": dtype})
    [datum] = found["data"]
    assert {type(number) for number in datum["embedding"]} == {kind}
    assert len(datum["embedding"]) == (HIDDEN_SIZE // 8 if dtype == "binary" else HIDDEN_SIZE)
    assert ("scale" in datum) == (dtype == "int8")
    packed = await embeddings(door, {"input": "a b", "dtype": dtype, "encoding_format": "base64"})
    raw = base64.b64decode(packed["data"][0]["embedding"])
    stored = {"int8": "i1", "binary": "u1", "float16": "<f2"}[dtype]
    assert np.frombuffer(raw, stored).tobytes() == np.array(datum["embedding"], stored).tobytes()


async def test_every_field_of_a_job_reaches_the_job(door: Door) -> None:
    await embeddings(
        door,
        {
            "input": ["a"],
            "model": "default",
            "model_version": OLD,
            "dimensions": 32,
            "dtype": "float16",
            "instruction": "find it",
            "input_type": "query",
            "truncate": "start",
            "user": "someone",
        },
    )
    [received] = door.service.received
    job = received.job
    assert (job.input, job.model, job.model_version) == ("a", "default", OLD)
    assert (job.dimensions, job.dtype) == (32, "float16")
    assert (job.instruction, job.input_type, job.truncate) == ("find it", "query", "start")


async def test_late_chunks_come_with_their_spans(door: Door) -> None:
    found = await embeddings(door, {"input": ["abcdefghij", "k"], "chunk": {"mode": "late", "tokens": 8}})
    assert [(each["index"], each["span"]) for each in found["data"]] == [
        (0, [0, 8]),
        (0, [8, 10]),
        (1, [0, 1]),
    ]


async def test_metadata_comes_back_and_is_left_out_where_there_is_none(door: Door) -> None:
    metadata = {"row": 7, "deep": [{"ü": None}]}
    assert (await embeddings(door, {"input": "a", "metadata": metadata}))["metadata"] == metadata
    assert "metadata" not in await embeddings(door, {"input": "a", "metadata": None})


async def test_the_model_version_is_in_a_header_and_in_a_field(door: Door) -> None:
    answer = await door.post("/v1/embeddings", {"input": "a"})
    assert answer.headers["x-embedq-model-version"] == answer.json()["model_version"] == OLD


async def test_headers_choose_lane_deadline_and_trace(door: Door) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await embeddings(door, {"input": "a"}, x_embedq_lane="bulk", x_request_timeout="2.5", traceparent=trace)
    [received] = door.service.received
    assert received.topic == "embed.jobs.bulk"
    assert ("traceparent", trace.encode()) in received.headers.echo
    assert door.transport.sent[0].timeout == 2.5


async def test_a_deadline_is_never_longer_than_the_setting_allows() -> None:
    async with a_gateway(timeout_s=5.0, max_timeout_s=8.0) as door:
        await embeddings(door, {"input": "a"})
        await embeddings(door, {"input": "a"}, x_request_timeout="999999999")
        assert [job.timeout for job in door.transport.sent] == [5.0, 8.0]


async def test_a_traceparent_that_is_none_is_left_out(door: Door) -> None:
    await embeddings(door, {"input": "a"}, traceparent="nonsense")
    assert [name for name, _ in door.service.received[0].headers.echo if name == "traceparent"] == []


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x_request_timeout", "soon"),
        ("x_request_timeout", "0"),
        ("x_request_timeout", "-1"),
        ("x_request_timeout", "nan"),
        ("x_request_timeout", "1e3"),
        ("x_embedq_lane", "slow"),
    ],
)
async def test_a_header_that_breaks_its_rule_is_named(door: Door, header: str, value: str) -> None:
    error = await refused(door, {"input": "a"}, 400, **{header: value})
    assert (error["code"], error["param"]) == ("invalid_header", header.replace("_", "-"))


@pytest.mark.parametrize("value", [[1, 2, 3], [[1, 2], [3]]], ids=["ids", "lists of ids"])
async def test_token_ids_are_refused_with_what_to_set(door: Door, value: Any) -> None:
    error = await refused(door, {"input": value, "model": "default"}, 400)
    assert (error["code"], error["param"], error["type"]) == (
        "invalid_value",
        "input",
        "invalid_request_error",
    )
    assert "check_embedding_ctx_length=False" in error["message"]
    assert door.service.received == []


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": None}, "invalid_value", "input"),
        ({"input": ["a", 1]}, "invalid_value", "input[1]"),
        ({"input": {"text": "a"}}, "invalid_value", "input"),
        ({"input": "a", "dimension": 3}, "unknown_field", "dimension"),
        ({"input": "a", "dimensions": 3}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": "64"}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 2**70}, "invalid_value", "dimensions"),
        ({"input": "a", "chunk": {"mode": "mean", "tokens": 2**64}}, "invalid_value", "chunk.tokens"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "a", "instruction": "x", "input_type": "document"}, "invalid_value", "instruction"),
        ({"input": "a", "chunk": {"mode": "late"}, "truncate": "end"}, "invalid_value", "truncate"),
        ({"input": "a", "metadata": 3}, "invalid_value", "metadata"),
        ({"input": "a", "model": ""}, "invalid_value", "model"),
        ([1], "malformed", None),
    ],
)
async def test_what_breaks_a_rule_is_named(door: Door, body: Any, code: str, param: str | None) -> None:
    error = await refused(door, body, 400)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert door.service.received == []


async def test_too_many_texts_are_refused() -> None:
    async with a_gateway(max_inputs=2) as door:
        error = await refused(door, {"input": ["a", "b", "c"]}, 413)
        assert (error["code"], error["param"]) == ("too_many_inputs", "input")


async def test_broken_json_is_refused(door: Door) -> None:
    answer = await door.http.post(
        "/v1/embeddings", content=b'{"input": ', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "malformed"


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
async def test_another_content_type_is_refused_since_pages_in_browsers_may_send_it_anywhere(
    door: Door, content_type: str
) -> None:
    answer = await door.http.post(
        "/v1/embeddings", content=b'{"input": "a"}', headers={"content-type": content_type}
    )
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_content_type"


async def test_a_parameter_of_the_content_type_does_no_harm(door: Door) -> None:
    answer = await door.http.post(
        "/v1/embeddings",
        content=b'{"input": "a"}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert answer.status_code == 200


async def test_a_large_body_is_refused_by_what_it_says_and_by_what_it_is() -> None:
    async with a_gateway(max_body_bytes=100) as door:
        error = await refused(door, {"input": "a" * 200}, 413)
        assert error["code"] == "body_too_large"

        async def pieces() -> Any:
            yield b'{"input": "'
            for _ in range(50):
                yield b"a" * 10

        answer = await door.http.post(
            "/v1/embeddings", content=pieces(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413


# -- models --------------------------------------------------------------------------------------------------------------


async def test_the_models_are_those_that_are_alive(door: Door) -> None:
    door.see("r2", alias="other", model_version=NEW, dimensions=None, max_tokens=None)
    door.see("r3", alias="gone", at=0)
    door.see("r4")
    found = (await door.http.get("/v1/models")).json()
    assert found["object"] == "list"
    assert [each["id"] for each in found["data"]] == ["default", "other"]
    first, second = found["data"]
    created = first.pop("created")
    assert isinstance(created, int)
    assert first == {
        "id": "default",
        "object": "model",
        "owned_by": "embedq",
        "model_version": OLD,
        "dimensions": HIDDEN_SIZE,
        "max_tokens": MAX_TOKENS,
        "replicas": 2,
    }
    assert (second["dimensions"], second["max_tokens"], second["replicas"]) == (None, None, 1)


async def test_one_model_is_found_by_its_name_and_names_its_version(door: Door) -> None:
    answer = await door.http.get("/v1/models/default")
    assert answer.json()["id"] == "default"
    assert answer.headers["x-embedq-model-version"] == OLD
    missing = await door.http.get("/v1/models/text-embedding-3-small")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_model"


async def test_an_alias_may_have_a_slash(door: Door) -> None:
    door.see("r2", alias="org/model")
    assert (await door.http.get("/v1/models/org/model")).json()["id"] == "org/model"


async def test_an_unknown_model_is_refused_before_a_job_is_sent(door: Door) -> None:
    error = await refused(door, {"input": "a", "model": "text-embedding-3-small"}, 404)
    assert (error["code"], error["param"], error["type"]) == ("unknown_model", "model", "not_found_error")
    assert door.service.received == []


async def test_a_model_whose_replicas_are_gone_for_a_while_is_waited_for(door: Door) -> None:
    door.see("r1", at=0)
    await embeddings(door, {"input": "a"})
    assert len(door.service.received) == 1


# -- what the service says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("text_too_long", 413),
        ("unknown_model", 404),
        ("unknown_model_version", 404),
        ("too_many_inputs", 413),
        ("non_finite", 422),
        ("crashed", 422),
        ("expired", 504),
        ("result_too_large", 413),
        ("invalid_value", 400),
        ("a_code_of_tomorrow", 400),
    ],
)
async def test_an_error_of_the_service_has_its_status(door: Door, code: str, status: int) -> None:
    def fail(received: Received) -> list[Answer]:
        error = ErrorBody(code=code, message="expected something else", param="input")
        return [door.service.failure(received, error)]

    door.service.behave = fail
    error = await refused(door, {"input": "a"}, status)
    assert error["message"].startswith("expected something else")


@pytest.mark.parametrize("code", ["overloaded", "internal", "undeliverable", "a_code_of_tomorrow"])
async def test_what_may_succeed_later_is_503_and_says_when(door: Door, code: str) -> None:
    def fail(received: Received) -> list[Answer]:
        return [
            door.service.failure(
                received, ErrorBody(code=code, message="not now", param=None, retryable=True)
            )
        ]

    door.service.behave = fail
    answer = await door.post("/v1/embeddings", {"input": "a"}, x_request_timeout="0.05")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


async def test_an_input_that_fails_alone_fails_the_request_and_is_named(door: Door) -> None:
    def fail(received: Received) -> list[Answer]:
        good = door.service.good(received)
        error = ErrorBody(
            code="text_too_long", message="expected at most 512 tokens, got 700", param="input[1]"
        )
        data = [
            msgspec.structs.replace(each, embedding=None, error=error) if each.index in (1, 3) else each
            for each in good.data
        ]
        return [changed(good, data=data)]

    door.service.behave = fail
    error = await refused(door, {"input": ["a", "b", "c", "d"]}, 413)
    assert (error["code"], error["param"]) == ("text_too_long", "input[1]")
    assert error["message"] == "expected at most 512 tokens, got 700 (and so did the inputs 3)"


async def test_a_request_without_an_answer_ends_with_504_at_its_deadline(door: Door) -> None:
    door.service.behave = lambda received: None
    error = await refused(door, {"input": "a"}, 504, x_request_timeout="0.05")
    assert (error["code"], error["type"]) == ("expired", "server_error")


async def test_kafka_away_is_503_and_names_no_broker(door: Door) -> None:
    door.transport.acknowledges = False
    door.transport.silent = True
    answer = await door.post("/v1/embeddings", {"input": "a"}, x_request_timeout="0.05")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert "fake:9092" not in answer.text
    assert "retry-after" in answer.headers


async def test_before_kafka_was_reached_it_is_503() -> None:
    async with a_gateway(opened=False) as door:
        error = await refused(door, {"input": "a"}, 503)
        assert error["code"] == "unavailable"


async def test_a_request_of_several_jobs_is_answered_as_one(door: Door) -> None:
    texts = [f"{n} " + "x" * 400_000 for n in range(5)]
    found = await embeddings(door, {"input": texts, "encoding_format": "base64"})
    assert len(door.service.received) > 1
    assert [each["index"] for each in found["data"]] == list(range(5))
    raw = [base64.b64decode(each["embedding"]) for each in found["data"]]
    assert raw == [expected(text).astype("<f4").tobytes() for text in texts]
    assert found["usage"]["total_tokens"] == 10


async def test_an_answer_in_parts_is_joined(door: Door) -> None:
    door.service.behave = lambda received: list(door.service.parts(received, 2))
    found = await embeddings(door, {"input": ["a", "b", "c"]})
    assert [each["index"] for each in found["data"]] == [0, 1, 2]
    assert found["usage"]["total_tokens"] == 3


async def test_a_reload_between_two_jobs_of_a_request_mixes_no_models(door: Door) -> None:
    def reloaded(received: Received) -> list[Answer]:
        door.service.version = OLD if len(door.service.received) == 1 else NEW
        return [door.service.good(received)]

    door.service.behave = reloaded
    texts = [f"{n} " + "x" * 500_000 for n in range(2)]
    found = await embeddings(door, {"input": texts, "encoding_format": "base64"})
    assert found["model_version"] == NEW
    raw = [base64.b64decode(each["embedding"]) for each in found["data"]]
    assert raw == [expected(text, salt=NEW).astype("<f4").tobytes() for text in texts]


async def test_the_order_of_fields_is_openais(door: Door) -> None:
    answer = await door.post("/v1/embeddings", {"input": "a"})
    assert list(json.loads(answer.text)) == ["object", "data", "model", "model_version", "usage"]


def test_a_callers_client_id_fits_a_header() -> None:
    assert len(b"key:") < MAX_CLIENT_BYTES
