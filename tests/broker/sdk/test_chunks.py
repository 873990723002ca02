"""Chunks in the client: late ones as spans with vectors, means as one vector, in every way a job can be sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedq_sdk import Chunk, EmbedClient, InvalidArgument, JobFailed, PartialFailure, late, mean
from embedq_sdk.embeddings import ReadDatum, ReadError, assemble
from embedq_sdk.errors import job_failed
from embedq_sdk.job_options import JobOptions
from embedq_shared.messages import Chunking, ErrorBody, Usage
from tests.helpers.responder import Answer, Received, Responder, expected
from tests.unit.sdk.test_embeddings import UNIT, failed, result

Clients = Callable[..., EmbedClient]
Responders = Callable[..., Responder]
kafka = pytest.mark.kafka

TEXT = "The moon is round. 😀 And the sun is too."


def spanned(index: int, start: int, end: int, value: float = 0.125) -> ReadDatum:
    vector = np.full(64, value, dtype=np.float32)
    return ReadDatum(index=index, embedding=vector.tobytes(), tokens=end - start, span=(start, end))


def assert_spans(chunks: list[Chunk], text: str, step: int) -> None:
    assert "".join(chunk.of(text) for chunk in chunks) == text
    assert all(chunk.end - chunk.start == step for chunk in chunks[:-1])
    for chunk in chunks:
        assert np.array_equal(chunk.vector, expected(chunk.of(text)))


# -- results ----------------------------------------------------------------------------------------------------------


def test_spans_are_rows_that_say_their_input_and_their_place() -> None:
    whole = result(spanned(0, 0, 5), spanned(0, 5, 9, 0.25), spanned(1, 0, 3), usage=Usage(20, 20))
    found = assemble([(2, [whole])])
    assert found.inputs.tolist() == [0, 0, 1]
    assert found.spans is not None
    assert found.spans.tolist() == [[0, 5], [5, 9], [0, 3]]
    assert (len(found), found.count, found.total_tokens) == (3, 2, 20)
    first, second = found.chunks()
    assert [(chunk.start, chunk.end, chunk.tokens) for chunk in first] == [(0, 5, 5), (5, 9, 4)]
    assert first[1].vector[0] == np.float32(0.25)
    assert [chunk.of("abc") for chunk in second] == ["abc"]


def test_spans_of_parts_and_of_several_jobs_stand_behind_each_other() -> None:
    one = [
        result(spanned(0, 0, 5, 0.1), part=0, parts=2),
        result(spanned(0, 5, 9, 0.2), spanned(1, 0, 3, 0.3), part=1, parts=2),
    ]
    other = [result(spanned(0, 0, 8, 0.4))]
    found = assemble([(2, one), (1, job_failed(ReadError("internal"))), (1, other)])
    assert found.inputs.tolist() == [0, 0, 1, 2, 3]
    assert list(found.errors) == [3]
    assert np.allclose(found.vectors[:, 0], [0.1, 0.2, 0.3, 0.0, 0.4])
    assert [len(chunks) for chunks in found.chunks()] == [2, 1, 0, 1]


def test_an_input_that_failed_among_spans_is_named_by_its_place_in_the_call() -> None:
    found = assemble([(3, [result(spanned(0, 0, 5), spanned(0, 5, 9), failed(1), spanned(2, 0, 1))])])
    assert list(found.errors) == [2]
    with pytest.raises(PartialFailure) as caught:
        found.checked()
    assert (caught.value.index, caught.value.failed, caught.value.total) == (1, 1, 3)
    assert caught.value.vectors.mask.any(axis=1).tolist() == [False, False, True, False]


def test_vectors_without_spans_have_none() -> None:
    found = assemble([(2, [result(ReadDatum(0, UNIT.tobytes()), ReadDatum(1, UNIT.tobytes()))])])
    assert found.spans is None
    assert found.inputs.tolist() == [0, 1]
    assert found.chunks() == [[], []]


# -- options ----------------------------------------------------------------------------------------------------------


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
    "wrong", ["late", {"mode": "late"}, 64, Chunking("early"), Chunking("late", 7)], ids=repr
)
def test_what_is_no_chunking_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        JobOptions(chunk=wrong)


@pytest.mark.parametrize("truncate", ["start", "end"])
def test_chunks_cut_nothing_off(truncate: Any) -> None:
    with pytest.raises(InvalidArgument, match="truncate"):
        JobOptions(chunk=mean(), truncate=truncate)
    JobOptions(chunk=mean(), truncate="error")


# -- over Kafka -------------------------------------------------------------------------------------------------------


@kafka
async def test_a_text_comes_back_as_its_spans(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        chunks = await embedq.embed_chunks(TEXT, chunk=late(8))
        whole = await embedq.embed_chunks("short")

    assert len(chunks) == 5
    assert_spans(chunks, TEXT, 8)
    assert_spans(whole, "short", 256)
    assert [received.job.chunk for received in other.received] == [Chunking("late", 8), Chunking("late", 256)]


@kafka
async def test_a_list_comes_back_as_rows_of_spans(client: Clients, responder: Responders) -> None:
    texts = [TEXT, "", "a short one"]
    async with responder(), client(max_inputs=2) as embedq:
        found = await embedq.embed_detailed(texts, chunk=late(8))
        many = await embedq.embed_many(iter(texts), chunk=late(8), batch_size=1)

    for text, chunks in zip(texts, found.chunks(), strict=True):
        assert_spans(chunks, text, 8)
    assert np.array_equal(many.vectors, found.vectors)
    assert np.array_equal(many.inputs, found.inputs)
    assert found.total_tokens == sum(len(text.split()) for text in texts)


@kafka
async def test_a_mean_is_one_vector(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        vector = await embedq.embed(TEXT, chunk=mean(64))

    assert np.array_equal(vector, expected(TEXT))
    assert other.received[0].job.chunk == Chunking("mean", 64)


async def test_late_chunks_do_not_fit_where_one_vector_is_returned(client: Clients) -> None:
    with pytest.raises(InvalidArgument, match="embed_chunks"):
        await client().embed(TEXT, chunk=late())
    with pytest.raises(InvalidArgument, match="chunk"):
        await client().embed_chunks(TEXT, chunk=mean())


@kafka
async def test_a_stream_gives_an_item_for_each_span(client: Clients, responder: Responders) -> None:
    texts = [TEXT, "a short one"]
    async with responder(), client() as embedq:
        items = [item async for item in embedq.stream(texts, chunk=late(16))]

    assert [(item.index, item.span) for item in items] == [
        (0, (0, 16)),
        (0, (16, 32)),
        (0, (32, len(TEXT))),
        (1, (0, 11)),
    ]
    for item in items:
        assert item.span is not None
        assert np.array_equal(item.vector, expected(item.text[slice(*item.span)]))


@kafka
@pytest.mark.parametrize("format", ["json", "msgpack"])
async def test_a_submitted_jobs_spans_are_on_the_results_topic(
    client: Clients, responder: Responders, format: Any
) -> None:
    async with responder(), client() as embedq:
        id = await embedq.submit([TEXT, "b"], chunk=late(8), format=format)
        async for found in embedq.results(from_beginning=True, timeout=20):
            if found.id == id:
                break

    assert found.embeddings is not None
    first, second = found.embeddings.chunks()
    assert_spans(first, TEXT, 8)
    assert_spans(second, "b", 8)


@kafka
async def test_a_text_of_too_many_spans_is_an_error_that_names_the_field(
    client: Clients, responder: Responders
) -> None:
    def refuse(received: Received) -> list[Answer]:
        error = ErrorBody.of("too_many_inputs", "`chunk`: expected at most 2048 spans in a job", "chunk")
        return [Responder.failure(received, error)]

    async with responder(behave=refuse), client() as embedq:
        with pytest.raises(JobFailed, match="spans") as caught:
            await embedq.embed_chunks(TEXT)
    assert caught.value.param == "chunk"
