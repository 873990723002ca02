"""Jobs of the job topics as documents, under the ids that `embedq sink --from results` gives their vectors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_batch.content.documents import Document
from embedq_batch.content.jobs import documents_of
from embedq_sdk.job_options import JobOptions
from embedq_shared.codec import CONTENT_TYPES, Format
from embedq_shared.kafka import ConsumerRecord, UnreadableRecord
from embedq_shared.topics import CONTENT_TYPE


def a_record(value: bytes | None, *headers: tuple[str, bytes]) -> Any:
    return ConsumerRecord("embed.jobs", 3, 7, 0, 0, None, value, None, 0, len(value or b""), headers)


def a_job(
    texts: str | list[str], id: str | None, *headers: tuple[str, bytes], format: Format = "json"
) -> Any:
    options = JobOptions(metadata={"title": "T", "text": "not this one"})
    kind = (CONTENT_TYPE, CONTENT_TYPES[format].encode())
    return a_record(options.encode(texts, id, format), kind, *headers)


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_texts_have_the_ids_of_their_vectors_and_the_metadata_as_columns(format: Format) -> None:
    def of(text: str) -> dict[str, str]:
        return {"title": "T", "text": text}

    assert documents_of(a_job("one", "a", format=format)) == [Document("a", of("one"))]
    assert documents_of(a_job(["one"], "a", format=format)) == [Document("a", of("one"))]
    assert documents_of(a_job(["one", "two"], "a", format=format)) == [
        Document("a#0", of("one")),
        Document("a#1", of("two")),
    ]
    assert documents_of(a_job("one", None, format=format)) == [Document("embed.jobs-3-7", of("one"))]


@pytest.mark.parametrize(
    "record",
    [
        a_job("a question", "a", ("reply-topic", b"replies"), ("reply-partition", b"\0\0\0\1")),
        a_job("a question", "a", ("kafka_replyTopic", b"replies")),
        a_record(None),
        a_record(b"{"),
        a_record(b'{"input": 1}'),
        a_record(b'{"input": "a"}', (CONTENT_TYPE, b"text/plain")),
        UnreadableRecord(topic="embed.jobs", partition=3, first_offset=7, offset=9, reason="damaged"),
    ],
)
def test_what_has_no_vector_in_a_store_is_no_document(record: Any) -> None:
    assert documents_of(record) == []


@given(st.none() | st.binary(max_size=60), st.sampled_from(list(CONTENT_TYPES.values())))
def test_any_bytes_are_read_without_an_error(value: bytes | None, kind: str) -> None:
    assert all(
        isinstance(each, Document) for each in documents_of(a_record(value, (CONTENT_TYPE, kind.encode())))
    )


def test_metadata_that_is_no_object_is_no_column() -> None:
    value = msgspec.json.encode({"input": "one", "id": "a", "metadata": None})

    assert documents_of(a_record(value)) == [Document("a", {"text": "one"})]
