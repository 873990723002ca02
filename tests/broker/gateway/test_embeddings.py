"""Requests over HTTP to a real gateway, Kafka and model."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import numpy as np
import pytest

from embedq_sdk import EmbedClient
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.broker.gateway.conftest import HIDDEN, MAX_TOKENS
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.service_process import Replica
from tests.helpers.support import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.asyncio(loop_scope="session")]

TEXTS = ["the tide turns twice a day", "la lune tourne", "月は地球の周りを回る", "", " "]


async def test_vectors_over_http_equal_the_sdks_to_the_last_bit(
    gateway: GatewayProcess, stack: DevStack, topics: Topics
) -> None:
    async with EmbedClient(stack.kafka_servers, topic_prefix=topics.prefix) as client, gateway.http() as http:
        found = await client.embed_detailed(TEXTS)
        packed = await http.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"})
        plain = await http.post("/v1/embeddings", json={"input": TEXTS})
        for row, each in zip(found.vectors, packed.json()["data"], strict=True):
            assert base64.b64decode(each["embedding"]) == row.astype("<f4").tobytes()
        for row, each in zip(found.vectors, plain.json()["data"], strict=True):
            assert np.array(each["embedding"], dtype=np.float32).tobytes() == row.tobytes()
            assert [repr(number) for number in each["embedding"]] == [
                repr(float(str(number))) for number in row
            ]
        body = plain.json()
        assert body["model_version"] == plain.headers["x-embedq-model-version"] == found.model_version
        assert body["usage"]["total_tokens"] == found.total_tokens


async def test_the_status_topic_says_what_the_model_takes(gateway: GatewayProcess) -> None:
    async with gateway.http() as http:
        [model] = (await http.get("/v1/models")).json()["data"]
        assert (model["id"], model["dimensions"], model["max_tokens"]) == ("default", HIDDEN, MAX_TOKENS)
        answer = await http.post("/v1/embeddings", json={"input": "a"})
        assert answer.json()["model_version"] == model["model_version"]
        assert len(answer.json()["data"][0]["embedding"]) == HIDDEN


async def test_what_only_the_service_knows_is_refused_by_it(gateway: GatewayProcess) -> None:
    async with gateway.http() as http:
        long = await http.post("/v1/embeddings", json={"input": ["a", "moon " * 300]})
        assert long.status_code == 413
        assert (long.json()["error"]["code"], long.json()["error"]["param"]) == ("text_too_long", "input[1]")
        wide = await http.post("/v1/embeddings", json={"input": "a", "dimensions": HIDDEN + 1})
        assert wide.status_code == 400
        assert wide.json()["error"]["param"] == "dimensions"


async def test_a_stop_answers_what_was_accepted_and_exits_with_0(
    stack: DevStack, topics: Topics, replica: Replica, tmp_path: Path
) -> None:
    async with running(GatewayProcess(stack, topics, tmp_path / "gateway.log", workers=2)) as leaving:
        async with leaving.http() as http:
            work = [
                asyncio.create_task(
                    http.post("/v1/embeddings", json={"input": [f"{n} moon {k}" for k in range(64)]})
                )
                for n in range(16)
            ]
            await wait_until(lambda: any(task.done() for task in work), what="the first answer")
            code = await leaving.stop()
            answers = await asyncio.gather(*work)
        assert [answer.status_code for answer in answers] == [200] * len(work)
        assert code == 0
