"""Long texts through the real service, over a real Kafka and a real Redis: late chunks and means over windows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.engine import Chunked, Text, load_encoder
from embedq_sdk import EmbedClient, JobFailed, late, mean
from embedq_sdk.dev import DevStack
from embedq_shared.messages import Chunking
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_qwen3

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

Vectors = npt.NDArray[np.float32]

SENTENCE = "The moon is round, 😀 and the old stone wall is near the city of 北京. "


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 that takes 512 tokens."""
    return make_tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen", max_tokens=512)


def _reference(model: Path, text: str, chunk: Chunking, prompt: str = "") -> tuple[Chunked, Vectors]:
    """The pieces of a text, and what the engine alone gives for each, one window at a time."""
    encoder = load_encoder(model, device="cpu")
    (found,) = encoder.chunk([Text(text, prompt, chunk=chunk)])
    assert isinstance(found, Chunked)
    return found, np.concatenate([encoder.submit([window]).result() for window in found.windows])


def _units(rows: Vectors, dimensions: int) -> Vectors:
    return np.stack([cut_and_normalize(row, dimensions) for row in rows])


async def test_late_chunks_come_back_with_their_places_over_several_windows_and_parts(
    stack: DevStack, qwen: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    text = SENTENCE * 60
    chunk: dict[str, Any] = {"mode": "late", "tokens": 24}
    job = {"input": ["short", text, text], "chunk": chunk, "dimensions": 64, "instruction": "Find it"}
    replica = Replica(stack, topics, qwen, tmp_path / "log", max_result_bytes=40_000)
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
    ):
        await client.send_and_wait(topics.jobs, json.dumps(job | {"id": "json"}).encode())
        first = json.loads((await results.until(1))[0].value)
        records = await results.until(first["parts"])
        parts = sorted((json.loads(record.value) for record in records), key=lambda part: part["part"])
        await client.send_and_wait(
            topics.jobs,
            msgspec.msgpack.encode(job | {"id": "packed", "dtype": "int8"}),
            headers=[("content-type", b"application/msgpack")],
        )
        packed = msgspec.msgpack.decode((await results.until(len(parts) + 1))[-1].value)
        metrics = await replica.metrics()
        assert await replica.stop() == 0

    found, rows = await asyncio.to_thread(
        _reference, qwen, text, Chunking(**chunk), "Instruct: Find it\nQuery:"
    )
    assert len(found.windows) > 2
    assert len(parts) > 1
    data = [datum for part in parts for datum in part["data"]]
    for index in (1, 2):
        spans = [datum for datum in data if datum["index"] == index]
        assert [datum["span"] for datum in spans] == [[piece.start, piece.end] for piece in found.pieces]
        assert [datum["tokens"] for datum in spans] == [piece.tokens for piece in found.pieces]
        assert "".join(text[slice(*datum["span"])] for datum in spans) == text
        vectors = np.array([datum["embedding"] for datum in spans], dtype=np.float32)
        np.testing.assert_allclose(vectors, _units(rows, 64), atol=1e-5)
        assert not any(datum["cached"] or datum["truncated"] for datum in spans)
    assert [datum["span"] for datum in data if datum["index"] == 0] == [[0, 5]]
    run = {part["usage"]["total_tokens"] for part in parts}
    assert len(run) == 1
    assert run.pop() > 2 * found.tokens
    quantized = [datum for datum in packed["data"] if datum["index"] == 2]
    back = np.stack([np.frombuffer(datum["embedding"], "i1") * datum["scale"] for datum in quantized])
    np.testing.assert_allclose(back, _units(rows, 64), atol=3e-3)
    assert metrics["embedq_deduplicated_total"] == 2  # the text that each job holds twice


async def test_a_mean_over_windows_is_one_vector_that_the_cache_keeps_under_its_own_key(
    stack: DevStack, qwen: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    text = SENTENCE * 60 + topics.prefix
    replica = Replica(stack, topics, qwen, tmp_path / "log")
    async with replicas(replica), EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client:
        whole = await client.embed_detailed(text, chunk=mean(), dimensions=128)
        again = await client.embed_detailed(text, chunk=mean(512), dimensions=128)
        narrow = await client.embed_detailed(text, chunk=mean(100), dimensions=128)
        cut = await client.embed_detailed(text, truncate="end", dimensions=128)
        with pytest.raises(JobFailed, match="chunk") as refused:
            await client.embed(text)
        short = await client.embed_detailed(topics.prefix, chunk=mean())
        plain = await client.embed_detailed(topics.prefix)
        assert await replica.stop() == 0

    for answer, size in ((whole, 512), (narrow, 100)):
        found, rows = await asyncio.to_thread(_reference, qwen, text, Chunking("mean", size))
        assert len(found.windows) > 2
        weights = np.array([piece.tokens for piece in found.pieces], dtype=np.float64)
        expected = (weights[:, None] * _units(rows, 256)).sum(axis=0).astype(np.float32)
        np.testing.assert_allclose(answer.vectors[0], cut_and_normalize(expected, 128), atol=1e-5)
        assert answer.total_tokens == found.tokens
        assert answer.spans is None
    assert [bool(answer.cached[0]) for answer in (whole, again, narrow, cut)] == [False, True, False, False]
    np.testing.assert_allclose(again.vectors, whole.vectors, atol=1e-6)
    assert not np.allclose(narrow.vectors, whole.vectors, atol=1e-3)
    assert not np.allclose(cut.vectors, whole.vectors, atol=1e-3)
    assert refused.value.code == "text_too_long"
    assert not plain.cached[0]
    np.testing.assert_allclose(plain.vectors, short.vectors, atol=1e-5)


async def test_the_client_gets_spans_beside_other_jobs_and_equal_texts_are_computed_once(
    stack: DevStack, qwen: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    text = SENTENCE * 20
    replica = Replica(stack, topics, qwen, tmp_path / "log", redis=False, max_wait_ms=200)
    async with replicas(replica), EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client:
        calls: list[Any] = [client.embed_chunks(text, chunk=late(32)) for _ in range(8)]
        calls += [client.embed_chunks(text, chunk=late(64)) for _ in range(4)]
        calls += [client.embed(f"plain {n}") for n in range(20)]
        calls += [client.embed_chunks(text, chunk=late(32), dimensions=32)]
        answers = await asyncio.gather(*calls)
        metrics = await replica.metrics()
        items = [item async for item in client.stream([text, "b"], chunk=late(32))]
        assert await replica.stop() == 0

    found, rows = await asyncio.to_thread(_reference, qwen, text, late(32))
    for chunks in answers[:8]:
        assert [(chunk.start, chunk.end) for chunk in chunks] == [(p.start, p.end) for p in found.pieces]
        assert "".join(chunk.of(text) for chunk in chunks) == text
        np.testing.assert_allclose(np.stack([chunk.vector for chunk in chunks]), _units(rows, 256), atol=1e-5)
    np.testing.assert_allclose(np.stack([chunk.vector for chunk in answers[-1]]), _units(rows, 32), atol=1e-5)
    assert len(answers[8]) < len(answers[0])
    assert [item.span for item in items if item.index == 0] == [(p.start, p.end) for p in found.pieces]
    assert metrics["embedq_deduplicated_total"] >= 1


async def test_a_model_without_spans_says_so_and_still_takes_a_mean(stack: DevStack, tmp_path: Path) -> None:
    topics = await make_topics(stack, fresh_prefix())
    model = make_tiny_bert(tmp_path / "models" / "cls", pooling="cls")
    replica = Replica(stack, topics, model, tmp_path / "log")
    async with replicas(replica), EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client:
        with pytest.raises(JobFailed, match="first token") as refused:
            await client.embed_chunks(SENTENCE)
        vector = await client.embed(SENTENCE * 50, chunk=mean())
        assert await replica.stop() == 0
    assert (refused.value.code, refused.value.param) == ("invalid_value", "chunk.mode")
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
