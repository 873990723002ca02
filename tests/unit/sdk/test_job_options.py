from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest

from embedq_sdk import EmbedClient, InvalidArgument, late, mean
from embedq_sdk.job_options import (
    JobArguments,
    JobLimits,
    JobOptions,
    checked_client_id,
    checked_count,
    checked_format,
    checked_id,
    checked_texts,
    checked_timeout,
    text_size,
)
from embedq_shared.codec import decode_job
from embedq_shared.messages import Chunking


@pytest.mark.parametrize("value", ["", "x" * 257, "ü" * 129, "\ud800", b"us", 7])
def test_a_client_id_is_a_string_of_at_most_256_bytes(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="client_id"):
        checked_client_id(value)
    assert checked_client_id("ü" * 128) == "ü".encode() * 128
    assert checked_client_id(None) != checked_client_id(None)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"dimensions": 31}, "dimensions"),
        ({"dimensions": 64.0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": "64"}, "dimensions"),
        ({"dimensions": 36, "dtype": "binary"}, "dimensions"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": 1}, "dtype"),
        ({"input_type": "passage"}, "input_type"),
        ({"truncate": "middle"}, "truncate"),
        ({"truncate": True}, "truncate"),
        ({"lane": "slow"}, "lane"),
        ({"lane": None}, "lane"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"model_version": ""}, "model_version"),
        ({"model_version": "x" * 257}, "model_version"),
        ({"model_version": 5}, "model_version"),
        ({"instruction": 5}, "instruction"),
        ({"instruction": "\ud800"}, "instruction"),
        ({"instruction": "é" * 9_000}, "instruction"),
        ({"instruction": "find", "input_type": "document"}, "instruction"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"a": object()}}, "metadata"),
        ({"metadata": {"a": "x" * 17_000}}, "metadata"),
        ({"trace": "x" * 600}, "trace"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sent(settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        JobOptions(**settings)

    assert raised.value.argument == argument
    assert str(raised.value).startswith(f"`{argument}`: expected ")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5", None])
def test_a_timeout_is_a_positive_number(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="`timeout`"):
        checked_timeout("timeout", value)


@pytest.mark.parametrize("value", [0, 1.0, True, None])
def test_a_count_is_a_positive_integer(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="`batch_size`"):
        checked_count("batch_size", value)


@pytest.mark.parametrize("value", ["", "x" * 257, 7, "\udfff"])
def test_an_id_is_a_string_that_the_contract_allows(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="`id`"):
        checked_id(value)


@pytest.mark.parametrize(
    ("texts", "argument"),
    [
        ([], "texts"),
        (None, "texts"),
        (b"bytes", "texts"),
        ({"a": 1}, "texts"),
        ({"a", "b"}, "texts"),
        (["ok", None], r"texts\[1\]"),
        (["ok", ["token", "array"]], r"texts\[1\]"),
        (["\ud800"], r"texts\[0\]"),
        (["x" * 101], r"texts\[0\]"),
        (["é" * 51], r"texts\[0\]"),
    ],
)
def test_texts_that_no_job_can_carry_are_named(texts: Any, argument: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^`{argument}`: expected"):
        checked_texts(texts, 100)


def test_no_message_repeats_a_text() -> None:
    with pytest.raises(InvalidArgument) as raised:
        text_size("secret " * 50, "texts", 10)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_a_job_on_the_wire_is_what_was_asked_for(format: Any) -> None:
    options = JobOptions(
        model="m",
        model_version="sha256:ab",
        dimensions=64,
        dtype="int8",
        input_type="query",
        instruction="find it",
        truncate="end",
        metadata={"a": [1, None, "ü"], "b": 1.5},
        trace="00-1-2-01",
    )

    job = decode_job(options.encode(["x", ""], "id", format), format)

    assert job.input == ["x", ""]
    assert (job.id, job.model, job.model_version) == ("id", "m", "sha256:ab")
    assert (job.dimensions, job.dtype) == (64, "int8")
    assert (job.input_type, job.instruction, job.truncate) == ("query", "find it", "end")
    decode = msgspec.json.decode if format == "json" else msgspec.msgpack.decode
    assert decode(job.metadata) == {"a": [1, None, "ü"], "b": 1.5}


@pytest.mark.parametrize(
    ("sizes", "max_inputs", "max_job_bytes", "jobs"),
    [
        ([1, 1, 1, 1, 1], 2, 100, [2, 2, 1]),
        ([60, 60, 30, 10], 10, 100, [1, 3]),
        ([500], 10, 500, [1]),
        ([0, 500, 0], 10, 500, [3]),
        ([0, 500, 1], 10, 500, [2, 1]),
        ([1] * 10, 10, 10, [10]),
    ],
)
def test_lists_are_cut_by_count_and_by_bytes_and_nothing_is_lost(
    sizes: list[int], max_inputs: int, max_job_bytes: int, jobs: list[int]
) -> None:
    texts = ["x" * size for size in sizes]

    found = JobLimits(max_inputs=max_inputs, max_job_bytes=max_job_bytes).split(texts)

    assert [len(each.texts) for each in found] == jobs
    assert [text for each in found for text in each.texts] == texts
    assert [each.size for each in found] == [sum(map(len, each.texts)) for each in found]


def test_one_job_carries_its_texts_as_they_are_and_no_more_than_its_limits() -> None:
    limits = JobLimits(max_inputs=2, max_job_bytes=10)

    assert limits.one_job("é") == ("é", 2)
    assert limits.one_job(("a", "b")) == (["a", "b"], 2)
    with pytest.raises(
        InvalidArgument, match="at most 2 texts and 10 bytes, as in one job, got 3 texts and 3"
    ):
        limits.one_job(["a", "b", "c"])
    with pytest.raises(InvalidArgument, match="got 2 texts and 12 bytes"):
        limits.one_job(["a" * 6, "b" * 6])


@pytest.mark.parametrize("value", ["xml", None, ["json"], ""])
def test_a_format_is_one_of_the_two(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^`format`: expected one of json, msgpack, got "):
        checked_format(value)


def test_the_keyword_arguments_of_a_call_are_the_fields_of_its_options() -> None:
    fields = get_type_hints(JobOptions)

    assert get_type_hints(JobArguments) == fields
    assert list(JobArguments.__annotations__) == list(JobOptions.__struct_fields__)
    assert JobArguments.__optional_keys__ == fields.keys()


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"servers": ""}, "servers"),
        ({"servers": 9092}, "servers"),
        ({"servers": ["localhost:9092", 9093]}, "servers"),
        ({"servers": "http://localhost:9092"}, "servers"),
        ({"servers": ["localhost:9092", "other"]}, "servers"),
        ({"topic_prefix": "a b"}, "topic_prefix"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"max_inputs": 0}, "max_inputs"),
        ({"max_job_bytes": 10_000_000}, "max_job_bytes"),
        ({"max_in_flight_texts": -1}, "max_in_flight_texts"),
        ({"security_protokol": "SSL"}, "security_protokol"),
    ],
)
async def test_a_wrong_setting_of_the_client_is_named(settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        EmbedClient(**({"servers": "localhost:9092"} | settings))

    assert raised.value.argument == argument


# -- chunking ---------------------------------------------------------------------------------------------------------


def test_the_two_kinds_are_what_travels() -> None:
    assert late() == Chunking("late", 256)
    assert late(64) == Chunking("late", 64)
    assert mean() == Chunking("mean", None)
    assert b'"chunk":{"mode":"late","tokens":64}' in JobOptions(chunk=late(64)).encode("a", None, "json")
    assert b'"chunk":{"mode":"mean"}' in JobOptions(chunk=mean()).encode("a", None, "json")


@pytest.mark.parametrize("tokens", [7, 0, -1, 8.0, True, "64"])
@pytest.mark.parametrize("make", [late, mean])
def test_a_number_of_tokens_that_no_job_takes_is_refused(make: Any, tokens: Any) -> None:
    with pytest.raises(InvalidArgument, match="tokens"):
        make(tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        "late",
        {"mode": "late"},
        64,
        Chunking("early"),  # type: ignore[arg-type]
        Chunking("late", 7),
    ],
    ids=repr,
)
def test_what_is_no_chunking_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        JobOptions(chunk=wrong)


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_chunks_cut_nothing_off(truncate: Any) -> None:
    with pytest.raises(InvalidArgument, match="truncate"):
        JobOptions(chunk=mean(), truncate=truncate)
    JobOptions(chunk=mean(), truncate="error")
