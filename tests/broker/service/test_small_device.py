"""A device whose memory runs out, and one that is lost, under the real service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas
from tests.helpers.tiny_models import make_tiny_qwen3

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def oom_device(path: Path) -> dict[str, Any]:
    return {"python": ["-m", "tests.helpers.oom_device", str(path)], "redis": False}


async def test_what_does_not_fit_is_found_before_jobs_are_taken_and_again_while_they_run(
    stack: DevStack, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    most = tmp_path / "most"
    most.write_text("1200")
    model = make_tiny_qwen3(tmp_path / "model", max_tokens=2048)
    replica = Replica(stack, topics, model, tmp_path / "log", max_batch_tokens=2048, **oom_device(most))
    async with replicas(replica), producer(stack) as client, reader(stack, topics.results) as results:
        [found] = [event for event in replica.events() if event["event"] == "batch_budget"]
        assert (found["tokens"], found["longest_text"]) == (1024, 1152)
        ready = json.loads((await replica.page("/readyz"))[1])
        assert (ready["max_batch_tokens"], ready["max_text_tokens"]) == (1024, 1152)

        await client.send_and_wait(topics.jobs, json.dumps({"input": "7 " * 700, "id": "long"}).encode())
        [long] = await results.until(1)
        assert value_of(long.headers, "embedq-status") == b"error"
        error = json.loads(long.value)["error"]
        assert error["code"] == "text_too_long"
        assert "1152 tokens" in error["message"]

        most.write_text("40")  # another process takes the rest of the memory
        texts = [f"{number} and a few more words" for number in range(60)]
        texts.append("7 " * 100)
        await client.send_and_wait(topics.jobs, json.dumps({"input": texts, "id": "many"}).encode())
        [_, many] = await results.until(2)
        answer = json.loads(many.value)
        codes = [(datum.get("error") or {}).get("code") for datum in answer["data"]]
        assert codes == [None] * 60 + ["internal"]
        metrics = await replica.metrics()
        assert metrics["embedq_batch_budget_tokens"] == 1024 // 8
        assert any(event["event"] == "batch_budget_lowered" for event in replica.events())
        assert await replica.stop() == 0


async def test_a_lost_device_ends_the_process_and_the_next_one_answers_its_jobs(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics = await make_topics(stack, fresh_prefix())
    most = tmp_path / "most"
    most.write_text("100000")
    broken = Replica(stack, topics, models / "bert", tmp_path / "broken", **oom_device(most))
    healthy = Replica(stack, topics, models / "bert", tmp_path / "healthy", redis=False)
    async with replicas(broken), producer(stack) as client, reader(stack, topics.results) as results:
        most.write_text("0")
        await client.send_and_wait(topics.jobs, b'{"input": ["one", "two"], "id": "j"}')
        assert await broken.ended() == 1
        assert [event["reason"] for event in broken.events() if event["event"] == "failed"] == ["DeviceLost"]
        assert await results.all() == []
        async with replicas(healthy):
            [answer] = await results.until(1)
            assert value_of(answer.headers, "embedq-status") == b"ok"
            assert await healthy.stop() == 0
