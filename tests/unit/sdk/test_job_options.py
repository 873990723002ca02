from __future__ import annotations

from typing import Any

import msgspec
import pytest

from embedq_sdk import EmbedClient, InvalidArgument
from embedq_sdk.job_options import (
    JobOptions,
    checked_count,
    checked_id,
    checked_texts,
    checked_timeout,
    split,
    text_size,
)
from embedq_shared.codec import decode_job


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
        "m", 64, "int8", "query", "find it", "end", {"a": [1, None, "ü"], "b": 1.5}, trace="00-1-2-01"
    )

    job = decode_job(options.encode(["x", ""], "id", format), format)

    assert job.input == ["x", ""]
    assert (job.id, job.model, job.dimensions, job.dtype) == ("id", "m", 64, "int8")
    assert (job.input_type, job.instruction, job.truncate) == ("query", "find it", "end")
    decode = msgspec.json.decode if format == "json" else msgspec.msgpack.decode
    assert decode(job.metadata) == {"a": [1, None, "ü"], "b": 1.5}


def test_lists_are_cut_by_count_and_by_bytes_and_nothing_is_lost() -> None:
    assert list(split([1, 1, 1, 1, 1], max_inputs=2, max_bytes=100)) == [(0, 2), (2, 4), (4, 5)]
    assert list(split([60, 60, 30, 10], max_inputs=10, max_bytes=100)) == [(0, 1), (1, 4)]
    assert list(split([500], max_inputs=10, max_bytes=100)) == [(0, 1)]
    assert list(split([0, 500, 0], max_inputs=10, max_bytes=100)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"servers": ""}, "servers"),
        ({"servers": 9092}, "servers"),
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
