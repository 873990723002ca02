"""The structs of the wire contract: what they leave out, keep and refuse."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from embedq_shared import codec
from embedq_shared.codec import Format
from embedq_shared.messages import (
    RETRYABLE,
    Control,
    Datum,
    ErrorBody,
    ErrorCode,
    Failure,
    Result,
    Status,
    Timings,
    Usage,
)

FORMATS: tuple[Format, ...] = ("json", "msgpack")
VERSION = "sha256:" + "ab" * 32
CONTROL = {"alias": "default", "version": 3, "path": "models/a", "command_id": "c-1"}


def result(format: Format, **fields: Any) -> Result:
    return Result(
        **{
            "id": "7",
            "model": "default",
            "model_version": VERSION,
            "dimensions": 32,
            "dtype": "float32",
            "data": [Datum(index=0, embedding=[0.5], tokens=3, truncated=False, cached=True)],
            "usage": Usage(3, 3),
            "timings": Timings(queue=0.25),
            "metadata": codec.null(format),
            **fields,
        }
    )


def plain(message: Result | Failure, format: Format) -> dict[str, Any]:
    decode = msgspec.json.decode if format == "json" else msgspec.msgpack.decode
    found = decode(codec.encode(message, format))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("code", get_args(ErrorCode))
def test_only_what_is_not_the_senders_fault_is_worth_a_retry(code: ErrorCode) -> None:
    assert ErrorBody.of(code, "m").retryable is (code in {"undeliverable", "overloaded", "internal"})
    assert set(get_args(ErrorCode)) >= RETRYABLE


@pytest.mark.parametrize("format", FORMATS)
def test_a_result_looks_as_the_contract_says(format: Format) -> None:
    assert plain(result(format), format) == {
        "object": "list",
        "id": "7",
        "model": "default",
        "model_version": VERSION,
        "dimensions": 32,
        "dtype": "float32",
        "data": [
            {
                "object": "embedding",
                "index": 0,
                "embedding": [0.5],
                "tokens": 3,
                "truncated": False,
                "cached": True,
                "error": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
        "timings": {"queue": 0.25, "tokenize": None, "compute": None, "device": None},
        "metadata": None,
        "part": 0,
        "parts": 1,
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_says_null_where_nothing_is_known(format: Format) -> None:
    error = ErrorBody.of("malformed", "expected JSON")
    failure = Failure(id=None, model=None, model_version=None, error=error, metadata=codec.null(format))
    assert plain(failure, format) == {
        "object": "error",
        "id": None,
        "model": None,
        "model_version": None,
        "error": {"code": "malformed", "message": "expected JSON", "param": None, "retryable": False},
        "metadata": None,
    }


def test_the_scale_is_there_for_int8_alone() -> None:
    with_scale = Datum(index=0, embedding=[1], scale=0.5)
    assert msgspec.to_builtins(with_scale)["scale"] == 0.5
    assert "scale" not in msgspec.to_builtins(Datum(index=0, embedding=[1]))


def test_messagepack_carries_a_vector_as_raw_bytes() -> None:
    value = codec.encode(result("msgpack", data=[Datum(index=0, embedding=b"\x00\xff")]), "msgpack")
    assert msgspec.msgpack.decode(value)["data"][0]["embedding"] == b"\x00\xff"


@pytest.mark.parametrize("format", FORMATS)
def test_results_and_failures_are_told_apart_by_their_object(format: Format) -> None:
    answer = result(format)
    found = codec.decode_result(codec.encode(answer, format), format)
    assert isinstance(found, Result)
    assert (found.id, found.data, found.usage, found.timings) == (
        "7",
        answer.data,
        answer.usage,
        answer.timings,
    )
    error = ErrorBody.of("expired", "m", "deadline")
    failure = Failure(id="7", model="a", model_version=VERSION, error=error, metadata=codec.null(format))
    found = codec.decode_result(codec.encode(failure, format), format)
    assert isinstance(found, Failure)
    assert found.error == error


def test_metadata_passes_through_a_result_untouched() -> None:
    raw = b'{ "b":1.0, "a" : [1e5] }'
    value = codec.encode(result("json", metadata=msgspec.Raw(raw)))
    assert raw in value
    found = codec.decode_result(value)
    assert bytes(found.metadata) == raw


def test_readers_ignore_fields_that_they_do_not_know() -> None:
    value = msgspec.json.encode(msgspec.json.decode(codec.encode(result("json"))) | {"new": 1})
    assert isinstance(codec.decode_result(value), Result)
    assert codec.decode_control(msgspec.json.encode({**CONTROL, "new": 1})).path == "models/a"


@pytest.mark.parametrize("value", [b"", b"{}", b"[]", b'{"object":"other"}', b'{"object":"list"}'])
def test_what_is_no_result_is_an_error(value: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        codec.decode_result(value)


def test_control_and_status_survive_their_encoding() -> None:
    control = Control(alias="default", version=3, path="a", command_id="c", min_cosine=0.5, fallback="b")
    status = Status(
        replica="r-1",
        alias="default",
        version=3,
        step="swap",
        state="LOADING",
        model_version=VERSION,
        error=None,
        at=1767225600000,
        command_id="c",
    )
    assert codec.decode_control(codec.encode_record(control)) == control
    assert codec.decode_status(codec.encode_record(status)) == status


def test_a_control_record_fills_in_its_defaults() -> None:
    found = codec.decode_control(msgspec.json.encode(CONTROL))
    assert (found.policy, found.quantization, found.rollout) == (None, None, None)
    assert (found.digest, found.min_cosine, found.golden, found.fallback) == (None, None, None, None)


def test_what_a_command_does_not_ask_for_is_not_in_its_record_so_that_older_replicas_can_read_it() -> None:
    command = Control(alias="default", version=3, path="a", command_id="c", policy="resource_preserving")
    assert msgspec.json.decode(codec.encode_record(command)) == {
        "alias": "default",
        "version": 3,
        "path": "a",
        "command_id": "c",
        "policy": "resource_preserving",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"alias": ""},
        {"alias": "x" * 257},
        {"version": 0},
        {"version": "1"},
        {"version": True},
        {"path": ""},
        {"path": None},
        {"command_id": ""},
        {"policy": "quick"},
        {"quantization": "int3"},
        {"golden": ""},
        {"golden_min_cosine": 1.5},
        {"min_dimensions": 0},
        {"rollout": {"max_unavailable": 0}},
        {"min_cosine": 1.01},
        {"min_cosine": "high"},
    ],
)
def test_a_control_record_that_breaks_a_rule_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        codec.decode_control(msgspec.json.encode({**CONTROL, **fields}))


@pytest.mark.parametrize("missing", sorted(CONTROL))
def test_a_control_record_is_complete(missing: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        codec.decode_control(msgspec.json.encode({k: v for k, v in CONTROL.items() if k != missing}))
