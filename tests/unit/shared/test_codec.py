"""Bytes to jobs: each rule of the wire contract, and what a job that breaks it is told."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared import codec
from embedq_shared.codec import BadJob, Format
from embedq_shared.messages import MAX_INSTRUCTION_BYTES, MAX_METADATA_BYTES, Chunking, Job

FORMATS: tuple[Format, ...] = ("json", "msgpack")


def packed(value: Any, format: Format) -> bytes:
    return msgspec.json.encode(value) if format == "json" else msgspec.msgpack.encode(value)


def refusal(value: bytes | None, format: Format = "json", **limits: int) -> BadJob:
    with pytest.raises(BadJob) as caught:
        codec.decode_job(value, format, **limits)
    return caught.value


def verdict(value: bytes | None, format: Format = "json", **limits: int) -> tuple[str, str | None]:
    error = refusal(value, format, **limits).error
    return error.code, error.param


# -- what is a job ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "text", ["", " ", "\n\t", "a", "ab\0c", "日本語", "🧑🏽‍🚀", "<|im_end|>", "a" * 100_000]
)
def test_any_text_is_embedded_as_it_is(format: Format, text: str) -> None:
    assert codec.decode_job(packed({"input": text}, format), format).input == text
    assert codec.decode_job(packed({"input": [text, text]}, format), format).input == [text, text]


@pytest.mark.parametrize("format", FORMATS)
def test_null_in_an_optional_field_means_absent(format: Format) -> None:
    fields = [name for name in codec.EXPECTED if name != "input"]
    job = codec.decode_job(packed({"input": "a", **dict.fromkeys(fields)}, format), format)
    plain = codec.decode_job(packed({"input": "a"}, format), format)
    for name in fields:
        if name not in ("metadata", "user"):  # raw bytes, that of null
            assert getattr(job, name) is None
            assert getattr(plain, name) is None


def test_every_field_arrives() -> None:
    fields = {
        "input": ["a", "b"],
        "id": "7",
        "model": "large",
        "dimensions": 64,
        "dtype": "binary",
        "encoding_format": "base64",
        "input_type": "query",
        "instruction": "find",
        "truncate": "start",
        "metadata": {"a": [1, 2.5, None, True, "x"]},
        "user": "u-1",
    }
    job = codec.decode_job(json.dumps(fields).encode(), "json")
    found = {name: getattr(job, name) for name in fields}
    found["metadata"] = json.loads(bytes(job.metadata))
    found["user"] = json.loads(bytes(job.user))
    assert found == fields


def test_what_an_openai_client_sends_is_a_job() -> None:
    value = b'{"input":["a"],"model":"default","encoding_format":"base64","user":"u","dimensions":256}'
    assert codec.decode_job(value, "json").dimensions == 256


def test_metadata_keeps_the_very_bytes() -> None:
    raw = b'{ "b":1.0, "a" : 12345678901234567890123456789, "e":1E5, "s":"\\u00e9" }'
    job = codec.decode_job(b'{"input":"a","metadata":' + raw + b"}", "json")
    assert bytes(job.metadata) == raw


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b'{"input":"a","input":"b"}', "b"),
        (b'{"input":3,"input":"b"}', "b"),
        (b'{"input":"b","dtype":"wrong","dtype":null}', "b"),
        (b'{"dimensions":"x","input":"b","dimensions":64}', "b"),
    ],
)
def test_of_a_repeated_key_the_last_one_counts(value: bytes, text: str) -> None:
    assert codec.decode_job(value, "json").input == text


def test_a_repeated_key_is_wrong_if_its_last_value_is() -> None:
    assert verdict(b'{"input":"a","input":3}') == ("invalid_value", "input")
    assert verdict(b'{"input":"a","id":"7","id":""}') == ("invalid_value", "id")


def test_a_repaired_job_keeps_its_metadata() -> None:
    job = codec.decode_job(b'{"input":3,"metadata":{"a":[1e5,"x"]},"input":"b"}', "json")
    assert json.loads(bytes(job.metadata)) == {"a": [1e5, "x"]}


# -- malformed --------------------------------------------------------------------------------------------------------


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b" ",
        b"null",
        b"1",
        b'"a"',
        b"[]",
        b'[{"input":"a"}]',
        b'{"input":"a"',
        b'{"input":"a"} {"input":"b"}',
        b'{"input":"a"}x',
        b"{'input':'a'}",
        b'{"input":"a",}',
        b'\xef\xbb\xbf{"input":"a"}',
        '{"input":"a"}'.encode("utf-16"),
        b'{"input":"\xff"}',
        b'{"input":"\xed\xa0\x80"}',
        b'{"input":"\\ud800"}',
        b'{"input":["a","\\udc00\\ud800"]}',
        b'{"input":"a","id":"\\ud800"}',
        b'{"input":"a","metadata":{"a":"\\ud800"}}',
        b'{"input":"a","metadata":{"\\ud800":1}}',
        b'{"input":"a","user":"\\ud800"}',
        b'{"input":"a\nb"}',
        b'{"input":NaN}',
        b'{"input":"a","metadata":{"a":NaN}}',
        b'{"input":"a","metadata":{"a":-Infinity}}',
        b'{"input":"a","metadata":{"a":1e999}}',
        b'{"input":"a","user":Infinity}',
        b'{"input":"a","user":' + b"9" * 310 + b"}",
        b'{"input":"a","user":-' + b"9" * 310 + b"}",
        b'{"input":"a","user":' + b"9" * 4_300 + b"}",
        b'{"input":"a","user":' + b"9" * 4_301 + b"}",
        b'{"input":"a","metadata":{"a":[' + b"9" * 310 + b"]}}",
        b'{"input":"a","dimensions":' + b"9" * 310 + b"}",
        b'{"input":"a","chunk":{"mode":"mean","tokens":' + b"9" * 310 + b"}}",
        b'{"input":"a","user":' + nested(64) + b"}",
        b'{"input":"a","metadata":{"a":' + nested(63) + b"}}",
        b'{"input":"a","user":' + nested(5_000) + b"}",
        b'{"input":' + nested(100_000) + b"}",
        b"\x00\x01\x02",
    ],
)
def test_a_value_that_is_no_json_object_is_malformed(value: bytes | None) -> None:
    assert refusal(value).error.code == "malformed"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\xc0",
        b"\xc1",
        b"\x91\x01",
        b"\x81\xa5input",
        b"\x81\xa5input\xa5ab",
        b"\x81\xa5input\xa1\xff",
        b"\x81\xa5input\xa3\xed\xa0\x80",
        packed({"input": "a"}, "msgpack") + b"x",
        packed({"input": "a", 1: 2}, "msgpack"),
        packed({"input": "a", "metadata": {"a": math.nan}}, "msgpack"),
        packed({"input": "a", "user": -math.inf}, "msgpack"),
        packed({"input": "a", "user": json.loads(nested(64))}, "msgpack"),
        b"\x82\xa5input\xa1a\xa4user" + b"\x91" * 5_000 + b"\x01",
        b"\x81\xa5input" + b"\x91" * 100_000 + b"\x01",
    ],
)
def test_a_value_that_is_no_messagepack_map_is_malformed(value: bytes | None) -> None:
    assert refusal(value, "msgpack").error.code == "malformed"


def test_the_largest_integers_that_a_double_holds_are_allowed() -> None:
    largest = str(int(sys.float_info.max)).encode()
    job = codec.decode_job(b'{"input":"a","metadata":{"a":' + largest + b',"b":-' + largest + b"}}", "json")
    assert largest in bytes(job.metadata)


def test_64_levels_of_nesting_are_allowed() -> None:
    codec.decode_job(b'{"input":"a","user":' + nested(63) + b"}", "json")
    codec.decode_job(b'{"input":"a","metadata":{"a":' + nested(62) + b"}}", "json")


def test_a_malformed_value_says_where_it_broke() -> None:
    assert "broken at byte 9" in refusal(b'{"input":NaN}').error.message


# -- wrong fields -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [1, 2, 3]}, "input[0]"),
        ({"input": [[1, 2], [3]]}, "input[0]"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": ["a"] * 12 + [7]}, "input[12]"),
        ({"id": ""}, "id"),
        ({"id": "x" * 257}, "id"),
        ({"id": 7}, "id"),
        ({"model": 7}, "model"),
        ({"model": ["default"]}, "model"),
        ({"dimensions": 31}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -64}, "dimensions"),
        ({"dimensions": 64.0}, "dimensions"),
        ({"dimensions": "64"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "FLOAT32"}, "dtype"),
        ({"dtype": ""}, "dtype"),
        ({"dtype": 32}, "dtype"),
        ({"dtype": "binary", "dimensions": 36}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"input_type": "passage"}, "input_type"),
        ({"instruction": 1}, "instruction"),
        ({"instruction": ["find"]}, "instruction"),
        ({"instruction": "x" * (MAX_INSTRUCTION_BYTES + 1)}, "instruction"),
        ({"instruction": "é" * (MAX_INSTRUCTION_BYTES // 2 + 1)}, "instruction"),
        ({"instruction": "find", "input_type": "document"}, "instruction"),
        ({"instruction": "", "input_type": "document"}, "instruction"),
        ({"truncate": True}, "truncate"),
        ({"truncate": "middle"}, "truncate"),
        ({"chunk": "late"}, "chunk"),
        ({"chunk": [{"mode": "late"}]}, "chunk"),
        ({"chunk": False}, "chunk"),
        ({"chunk": {}}, "chunk.mode"),
        ({"chunk": {"tokens": 64}}, "chunk.mode"),
        ({"chunk": {"mode": "Late"}}, "chunk.mode"),
        ({"chunk": {"mode": None}}, "chunk.mode"),
        ({"chunk": {"mode": "x - at `$.id`"}}, "chunk.mode"),
        ({"chunk": {"mode": "late", "tokens": 7}}, "chunk.tokens"),
        ({"chunk": {"mode": "late", "tokens": 8.0}}, "chunk.tokens"),
        ({"chunk": {"mode": "mean", "tokens": True}}, "chunk.tokens"),
        ({"chunk": {"mode": "mean", "tokens": "8"}}, "chunk.tokens"),
        ({"chunk": {"mode": "mean"}, "truncate": "start"}, "truncate"),
        ({"metadata": []}, "metadata"),
        ({"metadata": "a"}, "metadata"),
        ({"metadata": 0}, "metadata"),
        ({"metadata": False}, "metadata"),
        ({"metadata": {"a": "x" * MAX_METADATA_BYTES}}, "metadata"),
    ],
)
def test_a_wrong_value_is_invalid_and_its_field_is_named(
    format: Format, fields: dict[str, Any], param: str
) -> None:
    assert verdict(packed({"input": "a", **fields}, format), format) == ("invalid_value", param)


@pytest.mark.parametrize("format", FORMATS)
def test_a_job_without_input_is_invalid(format: Format) -> None:
    assert verdict(packed({}, format), format) == ("invalid_value", "input")
    assert verdict(packed({"id": "7"}, format), format) == ("invalid_value", "input")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name", ["dimension", "Input", "texts", "", "a b", "ключ", "x` - at `$.id", "x` - at `$.chunk"]
)
def test_an_unknown_field_is_named(format: Format, name: str) -> None:
    assert verdict(packed({"input": "a", name: 1}, format), format) == ("unknown_field", name)


def test_an_unknown_field_is_answered_with_those_that_there_are() -> None:
    message = refusal(packed({"input": "a", "dimension": 64}, "json")).error.message

    assert message == f"unknown field `dimension`; a job has: {', '.join(codec.EXPECTED)}"
    assert codec.EXPECTED.keys() == set(Job.__struct_fields__)


@pytest.mark.parametrize("format", FORMATS)
def test_an_unknown_field_of_a_chunk_is_not_named(format: Format) -> None:
    bad = refusal(packed({"input": "a", "chunk": {"mode": "late", CANARY: 1}}, format), format)
    assert (bad.error.code, bad.error.param) == ("unknown_field", "chunk")
    assert bad.error.message == "unknown field in `chunk`; it has: mode, tokens"
    assert CANARY not in bad.error.message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("chunk", "found"),
    [
        (None, None),
        ({"mode": "late"}, Chunking("late")),
        ({"mode": "mean", "tokens": None}, Chunking("mean")),
        ({"mode": "mean", "tokens": 8}, Chunking("mean", 8)),
    ],
)
def test_a_chunk_is_read_as_it_is_meant(format: Format, chunk: Any, found: Chunking | None) -> None:
    job = codec.decode_job(packed({"input": "a", "chunk": chunk, "truncate": "error"}, format), format)
    assert job.chunk == found


def test_a_very_long_field_name_is_cut_in_the_error() -> None:
    error = refusal(packed({"input": "a", "x" * 10_000: 1}, "json")).error
    assert error.param == "x" * 64 + "…"
    assert len(error.message) < 300


def test_a_value_that_quotes_a_path_does_not_move_the_blame() -> None:
    assert verdict(b'{"input":"a","dtype":"x - at `$.id`"}') == ("invalid_value", "dtype")


def test_metadata_may_take_16_kb_and_no_byte_more() -> None:
    fits = b'{"a":"' + b"x" * (MAX_METADATA_BYTES - 8) + b'"}'
    assert len(fits) == MAX_METADATA_BYTES
    assert bytes(codec.decode_job(b'{"input":"a","metadata":' + fits + b"}", "json").metadata) == fits
    over = fits.replace(b"x", b"xx", 1)
    assert verdict(b'{"input":"a","metadata":' + over + b"}") == ("invalid_value", "metadata")


@pytest.mark.parametrize("letter", ["x", "é"])
def test_an_instruction_may_take_16_kb(letter: str) -> None:
    fits = letter * (MAX_INSTRUCTION_BYTES // len(letter.encode()))
    assert codec.decode_job(packed({"input": "a", "instruction": fits}, "json"), "json").instruction == fits


def test_more_inputs_than_the_setting_allows_are_too_many() -> None:
    assert len(codec.decode_job(packed({"input": ["a"] * 2048}, "json"), "json").input) == 2048
    assert verdict(packed({"input": ["a"] * 2049}, "json")) == ("too_many_inputs", "input")
    assert verdict(packed({"input": ["a"] * 3}, "json"), max_inputs=2) == ("too_many_inputs", "input")


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_messagepack_takes_no_encoding_format(encoding: str) -> None:
    value = packed({"input": "a", "encoding_format": encoding}, "msgpack")
    assert verdict(value, "msgpack") == ("invalid_value", "encoding_format")


@pytest.mark.parametrize(
    "value",
    [b"bytes", {1: 2}, [{"a": b"x"}], msgspec.msgpack.Ext(5, b"x"), datetime.datetime.now(datetime.UTC)],
)
@pytest.mark.parametrize("field", ["metadata", "user"])
def test_messagepack_extras_hold_only_what_json_can_say(field: str, value: Any) -> None:
    job = packed({"input": "a", field: {"a": value} if field == "metadata" else value}, "msgpack")
    assert verdict(job, "msgpack") == ("invalid_value", field)


def test_bytes_are_no_text_in_messagepack() -> None:
    assert verdict(packed({"input": b"a"}, "msgpack"), "msgpack") == ("invalid_value", "input")


def test_errors_of_a_job_are_not_worth_a_retry() -> None:
    assert refusal(b"{").error.retryable is False
    assert refusal(b'{"input":3}').error.retryable is False


# -- what an error still knows of its job -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [{"input": 3}, {"dimensions": 1}, {"bogus": 1}, {"input": []}])
def test_a_wrong_job_is_still_known_by_its_id_model_and_metadata(
    format: Format, wrong: dict[str, Any]
) -> None:
    fields = {"input": "a", "id": "7", "model": "large", "metadata": {"row": 3}, **wrong}
    envelope = refusal(packed(fields, format), format).envelope
    assert (envelope.id, envelope.model) == ("7", "large")
    assert bytes(envelope.metadata) == packed({"row": 3}, format)


@pytest.mark.parametrize("wrong", [{"id": ""}, {"id": 7}, {"id": "x" * 257}, {"id": ["7"]}])
def test_a_wrong_id_is_not_repeated(wrong: dict[str, Any]) -> None:
    assert refusal(packed({"input": "a", **wrong}, "json")).envelope.id is None


def test_wrong_metadata_is_not_repeated() -> None:
    envelope = refusal(b'{"input":"a","id":"7","metadata":[1]}').envelope
    assert envelope.id == "7"
    assert bytes(envelope.metadata) == b""


def test_nothing_is_known_of_a_value_that_does_not_decode() -> None:
    envelope = refusal(b'{"id":"7","input":"a"').envelope
    assert (envelope.id, envelope.model, bytes(envelope.metadata)) == (None, None, b"")


# -- messages never repeat what was sent ------------------------------------------------------------------------------

CANARY = "kanarie-4711-🐤"
VALUES: tuple[Any, ...] = (CANARY, [CANARY], {CANARY: CANARY}, [[CANARY]], {"a": [CANARY, 1]})


@given(
    field=st.sampled_from(sorted(codec.EXPECTED)),
    value=st.sampled_from(VALUES),
    also=st.sampled_from([*sorted(codec.EXPECTED), "bogus"]),
    format=st.sampled_from(FORMATS),
    tail=st.sampled_from([b"", b"x", b"}"]),
)
def test_an_error_never_repeats_a_value(
    field: str, value: Any, also: str, format: Format, tail: bytes
) -> None:
    job = packed({"input": CANARY, field: value, also: value}, format) + tail
    try:
        codec.decode_job(job, format)
    except BadJob as bad:
        said = f"{bad} {bad.error.message} {bad.error.param} {bad.__cause__}"
        assert "kanarie" not in said
        assert "4711" not in said


@given(st.binary(max_size=40), st.integers(0, 60), st.sampled_from(FORMATS))
def test_no_bytes_raise_anything_but_a_bad_job(noise: bytes, at: int, format: Format) -> None:
    job = packed({"input": ["abc", "d"], "id": "7", "metadata": {"a": 1}, "dimensions": 64}, format)
    for value in (noise, job[:at] + noise + job[at:], job[:at] + noise):
        with contextlib.suppress(BadJob):
            assert isinstance(codec.decode_job(value, format), Job)


# -- round trips ------------------------------------------------------------------------------------------------------

optional: dict[str, st.SearchStrategy[Any]] = {
    "id": st.text(min_size=1, max_size=20),
    "model": st.text(max_size=20),
    "dimensions": st.integers(4, 500).map(lambda eighth: eighth * 8),
    "dtype": st.sampled_from(["float32", "float16", "int8", "binary"]),
    "input_type": st.sampled_from(["query", "document"]),
    "truncate": st.sampled_from(["error", "start", "end"]),
}


@given(
    st.fixed_dictionaries(
        {"input": st.text() | st.lists(st.text(), min_size=1, max_size=5)}, optional=optional
    ),
    st.sampled_from(FORMATS),
)
def test_a_job_survives_its_encoding(fields: dict[str, Any], format: Format) -> None:
    found = codec.decode_job(codec.encode(Job(**fields), format), format)
    for name, value in fields.items():
        assert getattr(found, name) == value


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_absent_is_left_out_or_null(format: Format) -> None:
    decode = msgspec.json.decode if format == "json" else msgspec.msgpack.decode
    found = decode(codec.encode(Job(input="a"), format))
    assert {name: value for name, value in found.items() if value is not None} == {"input": "a"}


# -- content types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "format"),
    [
        (None, "json"),
        (b"application/json", "json"),
        (b"Application/JSON; charset=utf-8", "json"),
        (b" application/json ", "json"),
        (b"application/msgpack", "msgpack"),
        (b"application/x-msgpack", "msgpack"),
        (b"APPLICATION/VND.MSGPACK;v=1", "msgpack"),
        (b"", None),
        (b"text/plain", None),
        (b"application/json+x", None),
        (b"application/avro", None),
        (b"\xff\xfe", None),
    ],
)
def test_the_content_type_chooses_the_codec(content_type: bytes | None, format: Format | None) -> None:
    assert codec.format_of(content_type) == format


@pytest.mark.parametrize("number", ["1" * 400, "1" * 5000, str(2**63), "-1"])
@pytest.mark.parametrize("field", ["at", "version"])
def test_times_and_versions_that_no_clock_and_no_encoder_takes_are_refused(field: str, number: str) -> None:
    """One such record on a compacted topic ended `embedq status` with OverflowError for as long as it lay there."""
    status = {"replica": "r", "alias": "a", "version": 1, "step": "serving", "state": "READY", "at": 1}
    control = {"alias": "a", "version": 1, "path": "p", "command_id": "c"}
    status |= {"model_version": None, "error": None}
    assert codec.decode_status(json.dumps(status).encode()).version == 1
    assert codec.decode_control(json.dumps(control).encode()).version == 1
    for decode, record in ((codec.decode_status, status), (codec.decode_control, control)):
        if field in record:
            value = json.dumps(record).replace(f'"{field}": 1', f'"{field}": {number}').encode()
            with pytest.raises(msgspec.DecodeError):
                decode(value)
