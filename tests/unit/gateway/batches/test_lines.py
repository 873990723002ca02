"""Lines of input files as they are split and looked at, and lines of output files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.batches.batch import FileFault
from embedq_gateway.batches.identities import new_id
from embedq_gateway.batches.running import lines as module
from embedq_gateway.batches.running.lines import (
    Answer,
    InputLine,
    LineTooLong,
    Validation,
    answered,
    destination,
    split,
    text_count,
    unfinished,
)

URL = "/v1/embeddings"
BATCH = new_id("batch", 1.8e9)


def split_all(chunks: Sequence[bytes]) -> list[InputLine]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[InputLine]:
        return [line async for line in split(source())]

    return asyncio.run(collect())


def request(custom_id: Any = "a", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"input": "text"}} | more


def verdict(*requests: Any, most: int = 100) -> list[FileFault]:
    check = Validation(URL, most)
    for number, each in enumerate(requests):
        data = each if isinstance(each, bytes) else json.dumps(each).encode()
        check.add(InputLine(number, number + 1, data))
    return check.end()


def codes(*requests: Any, most: int = 100) -> list[tuple[str, int | None, str | None]]:
    return [(fault.code, fault.line, fault.param) for fault in verdict(*requests, most=most)]


# -- splitting --------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([b"a", b"bb", b"\n", b"\r\n", b" ", b"\xe2\x82\xac"])), st.data())
def test_however_a_file_is_cut_into_chunks_its_lines_are_the_same(
    parts: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=5)))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    expected = [(n + 1, line) for n, line in enumerate(whole.split(b"\n")) if line.strip()]
    found = split_all(chunks)
    assert [(line.place, line.data) for line in found] == expected
    assert [line.number for line in found] == list(range(len(expected)))


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert [line.data for line in split_all([b"\xef\xbb\xbf{}\n", b"\xef\xbb\xbf"])] == [
        b"{}",
        b"\xef\xbb\xbf",
    ]
    assert [line.data for line in split_all([b"\xef\xbb\xbf{}"])] == [b"{}"]


def test_a_line_without_end_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    for chunks in ([b"{}\n" + b"x" * 11 + b"\n"], [b"{}\n", b"x" * 6, b"x" * 6, b"x" * 6]):
        with pytest.raises(LineTooLong) as failed:
            split_all(chunks)
        assert failed.value.number == 1


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_good_file_has_no_faults() -> None:
    assert verdict(request("a"), request("b", body={"input": ["x", "y"]}, more=1)) == []


def test_a_custom_id_that_came_before_is_refused() -> None:
    assert codes(request("a"), request("b"), request("a")) == [("duplicate_custom_id", 3, "custom_id")]


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_each_field_must_be_there(name: str) -> None:
    without = {field: value for field, value in request().items() if field != name}
    assert codes(without) == [("missing_required_parameter", 1, name)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (request(7), "invalid_value"),
        (request(""), "invalid_value"),
        (request("x" * 513), "invalid_value"),
        (request(method="GET"), "invalid_method"),
        (request(url="/v1/chat/completions"), "invalid_url"),
        (request(body="text"), "invalid_value"),
        (request(body=[1]), "invalid_value"),
    ],
)
def test_a_line_that_is_no_request_is_named_with_its_place(line: Any, code: str) -> None:
    [fault] = verdict(request("first"), line)
    assert (fault.code, fault.line) == (code, 2)
    assert "line 2" in fault.message


def test_an_empty_file_is_refused() -> None:
    assert codes() == [("empty_file", None, None)]


def test_a_file_with_too_many_lines_is_refused() -> None:
    assert codes(*(request(str(n)) for n in range(4)), most=3) == [("too_many_requests", None, None)]


def test_after_many_faults_the_rest_of_the_file_need_not_be_read() -> None:
    check = Validation(URL, 1000)
    while not check.enough:
        check.add(InputLine(check.total, check.total + 1, b"nonsense"))
    assert check.total == len(check.end()) == 20


# -- output -----------------------------------------------------------------------------------------------------------


def test_an_answered_line_is_as_openai_writes_it() -> None:
    line = answered(BATCH, 4, "row-é", Answer(status=200, body=b'{"data":[]}'))
    assert line.endswith(b"}\n")
    read = json.loads(line)
    assert read == {
        "id": read["id"],
        "custom_id": "row-é",
        "response": {"status_code": 200, "request_id": read["id"], "body": {"data": []}},
        "error": None,
    }
    assert read["id"].startswith("batch_req_")


def test_a_line_that_was_not_run_has_no_response() -> None:
    read = json.loads(unfinished(BATCH, 4, "a", "batch_expired"))
    assert read["response"] is None
    assert read["error"]["code"] == "batch_expired"
    assert "window" in read["error"]["message"]


def test_only_what_was_answered_with_200_is_output() -> None:
    statuses = (200, 400, 503)
    files = [destination(Answer(status=status, body=b"{}")) for status in statuses]
    assert files == ["output", "failures", "failures"]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"input":"a"}', 1),
        (b'{"input":["a","b","c"]}', 3),
        (b'{"input":[]}', 1),
        (b"{}", 1),
        (b"nonsense", 1),
    ],
)
def test_texts_are_counted_before_they_are_read(body: bytes, count: int) -> None:
    assert text_count(msgspec.Raw(body)) == count
