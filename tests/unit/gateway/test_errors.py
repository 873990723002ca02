"""Codes and statuses: the table, and what of the SDK and of the contract becomes which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from embedq_gateway.errors import KINDS, ApiError, api_error
from embedq_sdk import errors as sdk
from embedq_sdk.errors import EmbedError
from embedq_shared.messages import RETRYABLE, ErrorCode

PAGE = Path(__file__).parents[3] / "docs" / "gateway.md"

RETRIED = {408, 409, 429}
"""What openai's clients try again, and everything from 500 on."""


def test_every_code_of_the_contract_has_a_status() -> None:
    assert set(get_args(ErrorCode)) <= KINDS.keys()


@pytest.mark.parametrize("code", sorted(KINDS))
def test_what_openais_client_tries_again_is_what_may_succeed_later(code: str) -> None:
    status = KINDS[code].status
    worth = {*RETRYABLE, "expired", "rate_limit_exceeded", "model_changed", "unavailable", "gateway_fault"}
    worth.add("storage_unavailable")
    worth |= {"request_timeout", "too_many_connections", "superseded"}
    assert (status in RETRIED or status >= 500) == (code in worth)


def test_the_page_has_the_table() -> None:
    rows = re.findall(
        r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {code: (int(status), type, meaning) for status, code, type, meaning in rows} == {
        code: (kind.status, kind.type, kind.meaning) for code, kind in KINDS.items()
    }


def every_error() -> list[EmbedError]:
    facts = {
        "alias": "a",
        "argument": "texts[3]",
        "expected": "x",
        "got": "y",
        "where": "w",
        "texts": 1,
        "size": 1,
        "timeout": 1.0,
        "servers": "broker:9092",
        "reason": "r",
        "topic": "t",
        "progress": "p",
        "detail": "d",
        "shown": "s",
        "failed": 1,
        "total": 1,
        "index": 0,
        "first": "f",
        "code": "internal",
        "message": "m",
        "param": None,
        "retryable": True,
    }
    kinds = [kind for kind in vars(sdk).values() if isinstance(kind, type) and issubclass(kind, EmbedError)]
    return [kind(**facts) for kind in kinds]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_every_error_of_the_sdk_has_an_answer_that_names_no_broker(error: EmbedError) -> None:
    found = api_error(error)
    assert isinstance(found, ApiError)
    assert "broker:9092" not in found.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (sdk.KafkaUnavailable(servers="s", reason="r"), "unavailable"),
        (sdk.KafkaRefused(servers="s", reason="r"), "unavailable"),
        (sdk.TopicMissing(servers="s", topic="t"), "unavailable"),
        (sdk.ClientNotOpened(), "unavailable"),
        (sdk.Overloaded(texts=1, size=1, timeout=1.0), "overloaded"),
        (sdk.DeadlineExceeded(timeout=1.0, progress="p"), "expired"),
        (sdk.MixedModelVersions(versions=[], shown="a"), "model_changed"),
        (sdk.UnreadableReply(detail="d"), "internal"),
        (ValueError("x"), "gateway_fault"),
    ],
)
def test_what_became_of_the_request_has_its_code(error: Exception, code: str) -> None:
    assert api_error(error).code == code


def test_a_wrong_argument_is_named_as_the_request_names_it() -> None:
    error = api_error(sdk.InvalidArgument(argument="texts[3]", expected="x", got="y"))
    assert (error.code, error.param) == ("invalid_value", "input[3]")


@pytest.mark.parametrize(("seconds", "shown"), [(None, b"1"), (0.2, b"1"), (7.1, b"8")])
def test_retry_after_is_in_whole_seconds_and_never_too_early(seconds: float | None, shown: bytes) -> None:
    error = ApiError("rate_limit_exceeded", "m", retry_after_s=seconds)
    assert error.answer_headers() == [(b"retry-after", shown)]


def test_retry_after_is_only_where_trying_again_helps() -> None:
    assert ApiError("malformed", "m", retry_after_s=3.0).answer_headers() == []
