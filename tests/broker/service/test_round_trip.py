"""The main job on the real service, over a real Kafka and a real Redis, with a plain client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.engine import Text, Tokens, load_encoder
from embedq_sdk.dev import DevStack
from embedq_shared.headers import reply_partition_bytes, value_of
from embedq_shared.vectors import cut_and_normalize
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas


def _reference(model: Path, texts: list[str], dimensions: int) -> tuple[npt.NDArray[np.float32], str]:
    encoder = load_encoder(model, device="cpu")
    vectors = []
    for tokens in encoder.tokenize([Text(text) for text in texts]):
        assert isinstance(tokens, Tokens)
        vectors.append(cut_and_normalize(encoder.encode([tokens.ids])[0], dimensions))
    return np.stack(vectors), encoder.model_version


pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


async def test_a_json_job_comes_back_as_the_models_own_vector(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    # The event loop that no other test of the service has.
    replica = Replica(stack, topics, models / "qwen", tmp_path / "log", event_loop="uvloop")
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results, topics.replies) as results,
    ):
        await client.send_and_wait(
            topics.jobs, b'{"input": ["one text", "another"], "dimensions": 64, "id": "j"}'
        )
        address = [
            ("correlation-id", bytes(range(16))),
            ("reply-topic", topics.replies.encode()),
            ("reply-partition", reply_partition_bytes(2)),
            ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ]
        await client.send_and_wait(topics.bulk, b'{"input": "one text", "dimensions": 64}', headers=address)
        first, second = sorted(await results.until(2), key=lambda record: record.topic, reverse=True)

        assert (first.topic, second.topic) == (topics.results, topics.replies)
        assert first.key == b"j"
        assert second.partition == 2
        assert value_of(second.headers, "correlation-id") == bytes(range(16))
        assert value_of(second.headers, "traceparent") is not None
        assert value_of(second.headers, "reply-topic") is None
        assert value_of(second.headers, "embedq-status") == b"ok"
        result = json.loads(first.value)
        expected, version = await asyncio.to_thread(_reference, models / "qwen", ["one text", "another"], 64)
        found = np.array([datum["embedding"] for datum in result["data"]], dtype=np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert result["model_version"] == version
        assert result["model_version"].encode() == value_of(second.headers, "embedq-model-version")
        assert [datum["index"] for datum in result["data"]] == [0, 1]
        assert result["usage"]["total_tokens"] == sum(datum["tokens"] for datum in result["data"])

        await client.send_and_wait(topics.jobs, b'{"input": "one text", "dimensions": 64, "id": "again"}')
        again = json.loads((await results.until(3))[2].value)
        assert again["data"][0]["cached"] is True
        np.testing.assert_allclose(again["data"][0]["embedding"], found[0], atol=1e-6)
        assert await replica.stop() == 0


async def test_equal_texts_are_computed_once_whatever_their_jobs_ask_for(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix(), partitions=1)
    text = f"only here: {topics.prefix}"
    jobs = [
        {"id": "list", "input": [text] * 40, "dimensions": 64},
        {"id": "small", "input": text, "dimensions": 32},
        {"id": "int8", "input": text, "dtype": "int8"},
        {"id": "other", "input": text, "input_type": "query", "dimensions": 64},
    ]
    replica = Replica(stack, topics, models / "qwen", tmp_path / "log", redis=False)
    async with producer(stack) as client, reader(stack, topics.results) as results:
        for job in jobs:  # before the replica is there, so that one poll takes them all
            await client.send_and_wait(topics.jobs, json.dumps(job).encode())
        async with replicas(replica):
            answers = {
                record.key.decode(): json.loads(record.value) for record in await results.until(len(jobs))
            }
            metrics = await replica.metrics()
    expected, _ = await asyncio.to_thread(_reference, models / "qwen", [text], 64)
    for datum in answers["list"]["data"]:
        np.testing.assert_allclose(datum["embedding"], expected[0], atol=1e-5)
    small = np.array(answers["small"]["data"][0]["embedding"])
    np.testing.assert_allclose(small, expected[0, :32] / np.linalg.norm(expected[0, :32]), atol=1e-5)
    assert len(answers["int8"]["data"][0]["embedding"]) == 256
    assert not np.allclose(answers["other"]["data"][0]["embedding"], expected[0], atol=1e-2)
    assert metrics["embedq_deduplicated_total"] == 41
    tokens = {name: answers[name]["data"][0]["tokens"] for name in ("small", "other")}
    checked = metrics["embedq_tokens_total"]
    assert checked == tokens["small"] + tokens["other"]


async def test_a_restarted_replica_does_without_transformers(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    replica = Replica(stack, topics, models / "bert", tmp_path / "log", compile_cache=tmp_path / "kept")
    for _ in range(2):
        async with replicas(replica):
            assert await replica.stop() == 0
    first, second = (event for event in replica.events() if event["event"] == "model_loaded")
    assert first["model_version"] == second["model_version"]
    assert "transformers" in first["seconds"]
    assert "transformers" not in second["seconds"]
