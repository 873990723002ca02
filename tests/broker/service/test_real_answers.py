"""What a real service writes on a real broker fits the documents that it ships."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import ConsumerRecord
from jsonschema import Draft202012Validator

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from embedq_shared.topics import MSGPACK, Topics
from tests.helpers.asyncapi import MESSAGES, resolve
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.tiny_models import make_tiny_bert
from tools.schemas import SPEC

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

STEMS = {"list": "result", "error": "failure"}
GOOD = [
    {"input": "one text", "dtype": dtype, "encoding_format": encoding, "dimensions": 32}
    for dtype in ("float32", "float16", "int8", "binary")
    for encoding in ("float", "base64")
]
JOBS: list[dict[str, Any]] = [
    *GOOD,
    {"input": ["", " ", "日本語", "one text"], "id": "7", "metadata": {"row": [1, None, "x"]}},
    {"input": ["fine", "word " * 2_000], "dtype": "int8", "id": "partial"},
    {"input": ["word " * 2_000, "word " * 2_000], "id": "all failed"},
    {"input": "word " * 2_000, "truncate": "end"},
    {"input": "word " * 2_000},
    {"input": ["word " * 2_000, ""], "chunk": {"mode": "late", "tokens": 100}, "dtype": "int8"},
    {"input": "word " * 2_000, "chunk": {"mode": "mean"}, "dtype": "binary"},
    {"input": "word " * 40_000, "chunk": {"mode": "late", "tokens": 8}},
    {"input": "a", "model": "nobody"},
    {"input": "a", "dimensions": 8, "id": "8", "metadata": {"row": 1}},
    {"input": "a", "bogus": 1},
    {},
]


def schema(stem: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((SPEC / f"{stem}.schema.json").read_text("utf-8")))


def headers_schema(message: str) -> Draft202012Validator:
    return Draft202012Validator(resolve(MESSAGES[message]["headers"]))


def faults(validator: Draft202012Validator, found: Any) -> Iterator[str]:
    return (f"{error.json_path}: {error.message}" for error in validator.iter_errors(found))


def headers_of(record: ConsumerRecord) -> dict[str, str]:
    return {name: value.decode("latin-1") for name, value in record.headers}


async def test_every_kind_of_answer_fits_its_schema_and_its_headers(stack: DevStack, tmp_path: Path) -> None:
    model = tmp_path / "models" / "bert"
    make_tiny_bert(model)
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, model, tmp_path / "log")
    async with replicas(replica), producer(stack) as client, reader(stack, topics.results) as results:
        sent: list[tuple[bytes, list[Any]]] = [(json.dumps(job).encode(), []) for job in JOBS]
        sent += [
            (msgspec.msgpack.encode({k: v for k, v in job.items() if k != "encoding_format"}), [MSGPACK])
            for job in JOBS
        ]
        sent += [(b"{", []), (b"\xc1", [MSGPACK]), (b"{}", ["text/plain"])]
        for value, content_type in sent:
            headers = [("content-type", kind.encode()) for kind in content_type]
            await client.send_and_wait(topics.jobs, value, headers=headers)
        records = await results.until(len(sent))
        assert await replica.stop() == 0

    seen = set()
    for record in records:
        found, name = answer_in(record)
        assert list(faults(schema(STEMS[found["object"]]), found)) == []
        assert list(faults(headers_schema(name), headers_of(record))) == []
        status = value_of(record.headers, "embedq-status")
        assert status is not None
        seen.add((name, status.decode()))
    kinds = {("result", "ok"), ("result", "partial"), ("result", "error"), ("failure", "error")}
    assert seen == kinds | {(f"{name}Msgpack", status) for name, status in kinds}
    await check_dead_letters(stack, topics)
    await check_statuses(stack, topics)


def answer_in(record: ConsumerRecord) -> tuple[dict[str, Any], str]:
    """An answer as JSON says it, and which of AsyncAPI's messages it is."""
    if value_of(record.headers, "content-type") == MSGPACK.encode():
        found = msgspec.msgpack.decode(record.value)
        for datum in found.get("data", []):
            if datum["embedding"] is not None:
                assert isinstance(datum["embedding"], bytes)
                datum["embedding"] = "raw bytes"
        return found, f"{STEMS[found['object']]}Msgpack"
    found = json.loads(record.value)
    return found, STEMS[found["object"]]


async def check_dead_letters(stack: DevStack, topics: Topics) -> None:
    async with reader(stack, topics.dead_letters) as letters:
        found = await letters.until(3)
    assert {record.value for record in found} == {b"{", b"\xc1", b"{}"}
    for record in found:
        assert list(faults(headers_schema("deadLetter"), headers_of(record))) == []


async def check_statuses(stack: DevStack, topics: Topics) -> None:
    async with reader(stack, topics.status) as statuses:
        records = await statuses.all()
    found = [json.loads(record.value) for record in records]
    assert found
    assert [fault for status in found for fault in faults(schema("status"), status)] == []
    assert found[-1]["state"] == "STOPPED"
