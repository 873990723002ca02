"""Chunks in the client: late ones as spans with vectors, means as one vector, in every way a job can be sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedq_sdk import Chunk, EmbedClient, InvalidArgument, JobFailed, late, mean
from embedq_shared.messages import Chunking, ErrorBody
from tests.helpers.fake_service import Answer, Received, expected
from tests.helpers.responder import Responder
from tests.helpers.support import patient

Clients = Callable[..., EmbedClient]
Responders = Callable[..., Responder]
pytestmark = pytest.mark.kafka

TEXT = "The moon is round. 😀 And the sun is too."


def assert_spans(chunks: list[Chunk], text: str, step: int) -> None:
    assert "".join(chunk.of(text) for chunk in chunks) == text
    assert all(chunk.end - chunk.start == step for chunk in chunks[:-1])
    for chunk in chunks:
        assert np.array_equal(chunk.vector, expected(chunk.of(text)))


async def test_a_text_comes_back_as_its_spans(client: Clients, responder: Responders) -> None:
    async with responder() as other, client() as embedq:
        chunks = await embedq.embed_chunks(TEXT, chunk=late(8))
        whole = await embedq.embed_chunks("short")

    assert len(chunks) == 5
    assert_spans(chunks, TEXT, 8)
    assert_spans(whole, "short", 256)
    assert [received.job.chunk for received in other.received] == [Chunking("late", 8), Chunking("late", 256)]


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
        assert item.vector is not None
        assert np.array_equal(item.vector, expected(item.text[slice(*item.span)]))


@pytest.mark.parametrize("format", ["json", "msgpack"])
async def test_a_submitted_jobs_spans_are_on_the_results_topic(
    client: Clients, responder: Responders, format: Any
) -> None:
    async with responder(), client() as embedq:
        id = await embedq.submit([TEXT, "b"], chunk=late(8), format=format)
        async for found in embedq.results(from_beginning=True, timeout=patient(20)):
            if found.id == id:
                break

    assert found.embeddings is not None
    first, second = found.embeddings.chunks()
    assert_spans(first, TEXT, 8)
    assert_spans(second, "b", 8)


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
