"""No SDK, no Python: kcat publishes a JSON job and reads its JSON result."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, replicas
from tests.helpers.support import patient

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed"),
]


async def kcat(stack: DevStack, *arguments: str, stdin: bytes = b"") -> bytes:
    process = await asyncio.create_subprocess_exec(
        "kcat",
        *("-b", stack.kafka_servers, "-q", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(patient(60)):
            output, errors = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return output


async def first_record(stack: DevStack, topic: str) -> dict[str, Any]:
    """The first record of a topic, as kcat's JSON envelope has it: key, headers, payload."""
    envelope: dict[str, Any] = json.loads(
        await kcat(stack, "-C", "-t", topic, "-o", "beginning", "-c", "1", "-J")
    )
    pairs = envelope["headers"]
    return envelope | {"headers": dict(zip(pairs[::2], pairs[1::2], strict=True))}


async def test_a_job_published_with_kcat_is_answered_on_the_results_topic_and_at_its_reply_address(
    stack: DevStack, models: Path, tmp_path: Path
) -> None:
    topics: Topics = await make_topics(stack, fresh_prefix(), names=["a-team.replies"])
    async with replicas(Replica(stack, topics, models / "a", tmp_path / "log")):
        await kcat(
            stack, "-P", "-t", topics.jobs, stdin=b'{"input": "hello from a shell", "dimensions": 32}\n'
        )
        answer = await first_record(stack, topics.results)
        result = json.loads(answer["payload"])
        assert result["object"] == "list"
        assert result["id"] == answer["key"]
        assert result["id"].startswith(f"{topics.jobs}-")
        assert len(result["data"][0]["embedding"]) == 32
        assert sum(number**2 for number in result["data"][0]["embedding"]) == pytest.approx(1, abs=1e-4)
        assert answer["headers"]["embedq-status"] == "ok"
        assert answer["headers"]["embedq-model-version"] == result["model_version"]

        headers = ("-H", "correlation-id=from a shell", "-H", "reply-topic=a-team.replies", "-k", "my key")
        await kcat(
            stack, "-P", "-t", topics.bulk, *headers, stdin=b'{"input": ["a", "b"], "dimensions": 32}\n'
        )
        answer = await first_record(stack, "a-team.replies")
        assert answer["key"] == "my key"
        assert answer["headers"]["correlation-id"] == "from a shell"
        assert "reply-topic" not in answer["headers"]
        assert len(json.loads(answer["payload"])["data"]) == 2
