"""Answers as records: what is in them, how large results are split, what is left when not even an error fits."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.result_records import EncodedResult, Reply, ResultEncoder, _all_data
from embedq_consumer.intake.admission import Rejection
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome, Span, Spans
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import datum_bytes, fixed_bytes
from embedq_shared import codec
from embedq_shared.codec import Envelope, Format
from embedq_shared.headers import JobHeaders, parse, value_of
from embedq_shared.messages import ErrorBody, Result
from embedq_shared.vectors import quantize
from tests.helpers.in_flight import TOPICS, VERSION, admitted, record

ERROR = ErrorBody.of("text_too_long", "`input[1]`: expected at most 512 tokens, got 700", "input[1]")
MSGPACK = ("content-type", b"application/msgpack")


def answers(limit: int = 900_000) -> ResultEncoder:
    return ResultEncoder(TOPICS, "group", limit)


def unit(dimensions: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)


def answer(job: JobState, seed: int = 0, *, truncated: Literal["start", "end"] | None = None) -> InputVector:
    raw, scale = quantize(unit(job.request.dimensions, seed), job.request.dtype)
    return InputVector(raw, 3, truncated, scale, cached=False)


def settled(job: JobState, *outcomes: Outcome) -> JobState:
    for index, outcome in enumerate(outcomes):
        job.settle(index, outcome)
    return job


def body(outgoing: Outgoing) -> dict[str, Any]:
    packed = value_of(outgoing.headers, "content-type") == b"application/msgpack"
    found: dict[str, Any] = (msgspec.msgpack if packed else msgspec.json).decode(outgoing.value or b"")
    return found


def size(outgoing: Outgoing) -> int:
    headers = sum(len(name) + len(value) + 8 for name, value in outgoing.headers)
    return len(outgoing.value or b"") + len(outgoing.key or b"") + headers


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_says_all_that_the_contract_has() -> None:
    job = admitted(
        ("correlation-id", b"\xff\x00"), ("reply-topic", b"elsewhere"), ("reply-partition", b"\0\0\0\1"),
        input=["a", "b"], id="x", dimensions=32, metadata={"k": [1]},
    )  # fmt: skip
    job.queue_s, job.tokenize_s = 0.5, 0.25
    reply = answers().of_job(settled(job, answer(job), answer(job, 1, truncated="end")))
    [sent] = reply.outgoing
    found = body(sent)
    assert list(found) == [
        *("object", "id", "model", "model_version", "dimensions", "dtype", "data", "usage", "timings"),
        *("metadata", "part", "parts"),
    ]
    assert (found["object"], found["id"], found["model"], found["model_version"]) == (
        "list",
        "x",
        "default",
        VERSION,
    )
    assert (found["dimensions"], found["dtype"], found["metadata"]) == (32, "float32", {"k": [1]})
    assert found["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert found["timings"] == {"queue": 0.5, "tokenize": 0.25, "compute": None, "device": None}
    assert (found["part"], found["parts"]) == (0, 1)
    assert [datum["truncated"] for datum in found["data"]] == [False, True]
    assert set(found["data"][0]) == {"object", "index", "embedding", "tokens", "truncated", "cached", "error"}
    assert (sent.topic, sent.partition, sent.key) == ("elsewhere", 1, b"x")
    assert dict(sent.headers) == {
        "correlation-id": b"\xff\x00",
        "content-type": b"application/json",
        "embedq-status": b"ok",
        "embedq-model-version": VERSION.encode(),
    }
    assert (reply.status, reply.errors, reply.dead_letter) == ("ok", (), None)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_float32_decimals_read_back_the_same(numbers: list[float]) -> None:
    vector = np.array(numbers, dtype="<f4")
    job = admitted(input="a", dimensions=32)
    [sent] = (
        answers().of_job(settled(job, InputVector(vector.tobytes(), 1, None, None, cached=False))).outgoing
    )
    found = np.array(json.loads(sent.value or b"")["data"][0]["embedding"], dtype="<f4")
    assert found.tobytes() == vector.tobytes()
    assert len(sent.value or b"") <= 1024 + datum_bytes(job.request)


def test_float32_decimals_are_the_shortest() -> None:
    vector = np.array([0.1, 1 / 3, 1.0, -0.5] * 8, dtype="<f4")
    job = admitted(input="a", dimensions=32)
    [sent] = (
        answers().of_job(settled(job, InputVector(vector.tobytes(), 1, None, None, cached=False))).outgoing
    )
    assert b'"embedding":[0.1,0.33333334,1.0,-0.5,0.1,' in (sent.value or b"")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("form", ["float", "base64", "msgpack"])
def test_each_dtype_in_each_form_carries_the_same_bytes(dtype: str, form: str) -> None:
    fields: dict[str, Any] = {"input": "a", "dtype": dtype, "dimensions": 64}
    if form == "msgpack":
        job = admitted(MSGPACK, value=msgspec.msgpack.encode(fields))
    else:
        job = admitted(encoding_format=form, **fields)
    outcome = answer(job)
    [sent] = answers().of_job(settled(job, outcome)).outgoing
    datum = body(sent)["data"][0]
    numpy_type = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}[dtype]
    match form:
        case "float":
            assert all(isinstance(n, int) is (dtype in ("int8", "binary")) for n in datum["embedding"])
            raw = np.array(datum["embedding"], dtype=numpy_type).tobytes()
        case "base64":
            raw = base64.b64decode(datum["embedding"], validate=True)
        case _:
            raw = datum["embedding"]
    assert raw == outcome.vector
    assert ("scale" in datum) is (dtype == "int8")
    assert len(sent.value or b"") <= 1024 + datum_bytes(job.request)


def test_an_input_that_failed_leaves_the_others_their_vectors() -> None:
    job = admitted(input=["a", "b"], dimensions=32)
    reply = answers().of_job(settled(job, answer(job), ERROR))
    [sent] = reply.outgoing
    good, bad = body(sent)["data"]
    assert good["error"] is None
    assert (bad["index"], bad["embedding"], bad["tokens"], bad["error"]["code"]) == (
        1,
        None,
        None,
        "text_too_long",
    )
    assert (reply.status, reply.errors) == ("partial", (ERROR,))
    assert value_of(sent.headers, "embedq-status") == b"partial"
    assert body(sent)["usage"]["total_tokens"] == 3


def test_a_list_of_which_every_input_failed_is_a_list_of_errors() -> None:
    job = admitted(input=["a", "b"])
    [sent] = answers().of_job(settled(job, ERROR, ERROR)).outgoing
    assert (body(sent)["object"], value_of(sent.headers, "embedq-status")) == ("list", b"error")


def test_a_single_text_that_failed_is_an_error_that_says_which_model() -> None:
    job = admitted(input="a", id="x", metadata={"k": 1})
    reply = answers().of_job(settled(job, ERROR))
    [sent] = reply.outgoing
    found = body(sent)
    assert list(found) == ["object", "id", "model", "model_version", "error", "metadata"]
    assert (found["object"], found["id"], found["model_version"], found["metadata"]) == (
        "error",
        "x",
        VERSION,
        {"k": 1},
    )
    assert value_of(sent.headers, "embedq-model-version") == VERSION.encode()
    assert (reply.status, reply.dead_letter) == ("error", None)


def spans(job: JobState, count: int, tokens: int = 3) -> Spans:
    """So many spans of one text, each of four characters."""
    made = [answer(job, seed) for seed in range(count)]
    return Spans(
        tuple(Span(4 * n, 4 * n + 4, tokens, one.vector, one.scale) for n, one in enumerate(made)),
        tokens * count + 2,
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_late_chunks_are_a_datum_each_with_their_place(dtype: str) -> None:
    job = admitted(input=["a", "b", "c"], dimensions=32, dtype=dtype, chunk={"mode": "late"})
    reply = answers().of_job(settled(job, spans(job, 2), ERROR, spans(job, 1)))
    [sent] = reply.outgoing
    data = body(sent)["data"]
    assert [(datum["index"], datum.get("span")) for datum in data] == [
        (0, [0, 4]),
        (0, [4, 8]),
        (1, None),
        (2, [0, 4]),
    ]
    assert [datum["tokens"] for datum in data] == [3, 3, None, 3]
    assert [("scale" in datum) for datum in data] == [dtype == "int8"] * 2 + [False] + [dtype == "int8"]
    assert body(sent)["usage"]["total_tokens"] == 8 + 5
    assert reply.status == "partial"


def test_more_spans_than_a_job_may_have_fail_it_whole_whichever_came_first() -> None:
    for order in ((0, 1, 2), (2, 1, 0)):
        job = admitted(input=["a", "b", "c"], chunk={"mode": "late"}, id="x")
        for index in order:
            done = job.settle(index, spans(job, 1000))
        assert done
        reply = answers().of_job(job)
        error = body(reply.outgoing[0])["error"]
        assert (error["code"], error["param"], reply.status) == ("too_many_inputs", "chunk", "error")
        assert "2048" in error["message"]


@pytest.mark.parametrize("limit", [4096, 30_000])
def test_late_chunks_are_split_over_parts_within_the_limit(limit: int) -> None:
    job = admitted(input=["a", "b"], dimensions=64, chunk={"mode": "late"}, max_result_bytes=limit)
    reply = answers(limit).of_job(settled(job, spans(job, 150), spans(job, 70)))
    parts = [body(sent) for sent in reply.outgoing]
    assert len(parts) > 1
    assert max(size(sent) for sent in reply.outgoing) <= limit
    found = [(datum["index"], datum["span"][0]) for part in parts for datum in part["data"]]
    assert found == [(0, 4 * n) for n in range(150)] + [(1, 4 * n) for n in range(70)]


def test_the_longest_datum_of_a_span_is_within_its_bound() -> None:
    for format, encoding in (("json", "float"), ("json", "base64"), ("msgpack", None)):
        fields: dict[str, Any] = {"input": ["a"] * 2048, "dtype": "int8", "chunk": {"mode": "late"}}
        fields |= {"encoding_format": encoding} if encoding else {}
        headers = [MSGPACK] if format == "msgpack" else []
        value = (msgspec.json if format == "json" else msgspec.msgpack).encode(fields)
        job = admitted(*headers, value=value)
        span = Span(999_990, 1_000_000, 1_000_000, bytes([128] * 256), 1.2345678901234567e-05)
        job.settle(0, Spans((span,), 1_000_000))  # and its copies
        [*_, datum] = _all_data(job)
        assert b"2047" in bytes(datum) or format == "msgpack"
        assert len(bytes(datum)) < datum_bytes(job.request)


# -- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "base64", "msgpack"])
@pytest.mark.parametrize(("inputs", "limit"), [(1, 4096), (40, 4096), (300, 20_000), (2048, 100_000)])
def test_parts_are_contiguous_and_none_is_over_the_limit(form: str, inputs: int, limit: int) -> None:
    fields: dict[str, Any] = {
        "input": [str(number) for number in range(inputs)],
        "dimensions": 64,
        "id": "x",
        "metadata": {"k": "v" * 500},
    }
    if form == "msgpack":
        job = admitted(MSGPACK, value=msgspec.msgpack.encode(fields), max_result_bytes=limit, key=b"key")
    else:
        job = admitted(encoding_format=form, max_result_bytes=limit, key=b"key", **fields)
    reply = answers(limit).of_job(settled(job, *(answer(job, seed) for seed in range(inputs))))
    parts = [body(sent) for sent in reply.outgoing]
    assert [part["part"] for part in parts] == list(range(len(parts)))
    assert {part["parts"] for part in parts} == {len(parts)}
    assert [datum["index"] for part in parts for datum in part["data"]] == list(range(inputs))
    assert all(part["data"] for part in parts)
    assert {part["usage"]["total_tokens"] for part in parts} == {3 * inputs}
    assert {json.dumps(part["metadata"]) for part in parts} == {json.dumps({"k": "v" * 500})}
    assert {sent.key for sent in reply.outgoing} == {b"key"}
    assert max(size(sent) for sent in reply.outgoing) <= limit
    assert len(parts) == 1 or inputs > 1


@given(st.integers(2, 60), st.integers(0, 1500), st.data())
def test_no_part_is_over_the_limit_whatever_failed_in_it(
    inputs: int, spare: int, data: st.DataObject
) -> None:
    """The caller's metadata leaves little more room than one vector needs."""
    fields: dict[str, Any] = {
        "input": [str(number) for number in range(inputs)],
        "dimensions": 32,
        "dtype": "int8",
        "metadata": {"p": "x" * 5000},
    }
    job = admitted(**fields)
    limit = fixed_bytes(job.record, job.headers, job.request) + datum_bytes(job.request) + spare
    job = admitted(max_result_bytes=limit, **fields)
    kinds = data.draw(st.lists(st.booleans(), min_size=inputs, max_size=inputs))
    reply = answers(limit).of_job(
        settled(job, *(answer(job, n) if good else ERROR for n, good in enumerate(kinds)))
    )
    indices = [datum["index"] for sent in reply.outgoing for datum in body(sent)["data"]]
    assert indices == list(range(inputs))
    assert max(size(sent) for sent in reply.outgoing) <= limit


# -- errors -----------------------------------------------------------------------------------------------------------


def refused(
    *headers: tuple[str, bytes], limit: int = 900_000, key: bytes | None = None, **about: Any
) -> Reply:
    envelope = about.pop("envelope", Envelope("x", "m", msgspec.Raw(b'{"k":1}')))
    format: Format = about.pop("format", "json")
    rejection = Rejection(error=ERROR, format=format, headers=parse(headers), envelope=envelope, **about)
    return answers(limit).of_rejection(record(b"{}", *headers, key=key), rejection)


def test_an_error_that_is_about_the_version_says_which_is_served() -> None:
    [sent] = refused(model_version=VERSION).outgoing
    assert body(sent)["model_version"] == VERSION
    assert dict(sent.headers)["embedq-model-version"] == VERSION.encode()


def test_an_error_repeats_what_could_be_read_and_echoes_the_headers() -> None:
    [sent] = refused(
        ("kafka_correlationId", b"\x01"), ("kafka_replyTopic", b"elsewhere"), key=b"\xff"
    ).outgoing
    found = body(sent)
    assert (found["id"], found["model"], found["model_version"], found["metadata"]) == (
        "x",
        "m",
        None,
        {"k": 1},
    )
    assert (sent.topic, sent.key) == ("elsewhere", b"\xff")
    assert dict(sent.headers) == {
        "kafka_correlationId": b"\x01",
        "content-type": b"application/json",
        "embedq-status": b"error",
    }


def test_an_unreadable_job_is_answered_by_its_position() -> None:
    [sent] = refused(envelope=Envelope()).outgoing
    assert (body(sent)["id"], sent.key, sent.topic) == ("t.jobs-3-7", b"t.jobs-3-7", TOPICS.results)
    assert body(sent)["metadata"] is None


def test_an_error_is_packed_as_its_job_was() -> None:
    [sent] = refused(format="msgpack", envelope=Envelope("x", None, codec.null("msgpack"))).outgoing
    assert value_of(sent.headers, "content-type") == b"application/msgpack"
    assert body(sent)["error"]["param"] == "input[1]"


def test_an_address_that_cannot_be_used_is_not_used() -> None:
    reply = refused(("reply-topic", b"elsewhere"), ("correlation-id", b"c"), dead_letter=True, reply=False)
    [sent] = reply.outgoing
    assert (sent.topic, sent.partition) == (TOPICS.results, None)
    assert value_of(sent.headers, "correlation-id") == b"c"
    assert reply.dead_letter == ERROR


@pytest.mark.parametrize(
    ("key", "correlation", "metadata"),
    [(5000, 10, 10), (10, 5000, 10), (10, 10, 5000), (5000, 5000, 5000), (3000, 10, 3000)],
)
def test_an_error_always_fits(key: int, correlation: int, metadata: int) -> None:
    raw = msgspec.Raw(json.dumps({"k": "v" * metadata}).encode())
    [sent] = refused(
        ("correlation-id", b"c" * correlation), limit=4096, key=b"k" * key, envelope=Envelope("x", "m", raw)
    ).outgoing
    assert size(sent) <= 4096
    found = body(sent)
    assert (found["id"], found["error"]["code"]) == ("x", "text_too_long")
    if correlation < 4000:
        assert value_of(sent.headers, "correlation-id") == b"c" * correlation


@pytest.mark.parametrize("character", ["\x01", "🛂", "a"])
def test_an_error_for_the_longest_id_fits_the_smallest_limit(character: str) -> None:
    [sent] = refused(
        limit=4096, envelope=Envelope(character * 256, character * 256, msgspec.Raw(b"{}"))
    ).outgoing
    assert size(sent) <= 4096


def test_a_result_that_its_topic_does_not_take_becomes_an_error_on_the_results_topic() -> None:
    job = admitted(
        ("correlation-id", b"c"), ("reply-topic", b"elsewhere"), ("reply-partition", b"\0\0\0\1"),
        input="a", id="x", metadata={"k": 1},
    )  # fmt: skip
    error = ErrorBody.of("result_too_large", "expected a smaller one")
    reply = answers().of_undeliverable(answers().of_job(settled(job, answer(job))), error)
    [sent] = reply.outgoing
    assert (sent.topic, sent.partition, sent.key) == (TOPICS.results, None, b"x")
    assert (body(sent)["id"], body(sent)["model"], body(sent)["metadata"]) == ("x", "default", {"k": 1})
    assert value_of(sent.headers, "correlation-id") == b"c"
    assert (reply.status, reply.dead_letter) == ("error", error)


# -- dead letters -----------------------------------------------------------------------------------------------------


def buried(found: Record, *, result_sent: bool = True) -> Reply:
    rejection = Rejection(
        error=ERROR, format="json", headers=JobHeaders(), envelope=Envelope(), dead_letter=True
    )
    reply = answers().of_rejection(found, rejection)
    return reply if result_sent else msgspec.structs.replace(reply, outgoing=[])


def test_a_dead_letter_is_the_record_with_headers_after_its_own() -> None:
    own: Any = (("x", None), ("embedq-error-code", b"old"), ("x", b"2"))
    found = record(b"value", *own, key=b"key", timestamp_ms=5)
    letter = answers().dead_letter(buried(found, result_sent=False), 3)
    assert (letter.topic, letter.partition, letter.key, letter.value) == (
        TOPICS.dead_letters,
        3,
        b"key",
        b"value",
    )
    assert (letter.timestamp_ms, tuple(letter.headers[:3])) == (5, own)
    assert value_of(letter.headers, "embedq-error-code") == b"text_too_long"
    assert value_of(letter.headers, "embedq-result-sent") == b"false"
    assert value_of(letter.headers, "kafka_dlt-original-offset") == (7).to_bytes(8, "big")


def test_a_dead_letter_that_is_refused_goes_by_its_position_with_our_headers_alone() -> None:
    reply = buried(record(b"value", ("x", b"1"), key=b"key"))
    letter = answers().bare_dead_letter(reply, 3)
    assert (letter.topic, letter.partition, letter.key, letter.value) == (
        TOPICS.dead_letters,
        3,
        b"t.jobs-3-7",
        None,
    )
    assert letter.headers == answers().dead_letter(reply, 3).headers[1:]


def test_a_reply_without_an_error_is_no_dead_letter() -> None:
    job = admitted(input="a")
    with pytest.raises(RuntimeError, match="This is a bug"):
        answers().dead_letter(answers().of_job(settled(job, answer(job))), None)


def test_a_job_without_all_of_its_outcomes_has_no_result() -> None:
    job = admitted(input=["a", "b"])
    job.settle(0, answer(job))
    with pytest.raises(RuntimeError, match=r"input 1 has no outcome\. This is a bug\."):
        answers().of_job(job)


def test_the_encoded_result_has_the_fields_of_the_contract_in_their_order() -> None:
    assert EncodedResult.__struct_fields__ == Result.__struct_fields__
    assert EncodedResult.__struct_config__.tag == Result.__struct_config__.tag
    assert EncodedResult.__struct_config__.tag_field == Result.__struct_config__.tag_field


@pytest.mark.parametrize(("key", "value"), [(None, None), (b"k", None), (None, b""), (b"", None)])
def test_a_dead_letter_has_a_key_or_a_value(key: bytes | None, value: bytes | None) -> None:
    letter = answers().dead_letter(buried(record(value, key=key)), None)
    expected = b"t.jobs-3-7" if key is None and value is None else key
    assert (letter.key, letter.value) == (expected, value)


def test_a_record_without_a_timestamp_is_kept_without_one() -> None:
    letter = answers().dead_letter(buried(record(b"v", timestamp_ms=-1)), None)
    assert letter.timestamp_ms is None
