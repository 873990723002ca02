"""Batches over a real gateway, Kafka and model, as openai's client and LiteLLM make them; and a gateway that is killed half-way."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedq_sdk.dev import DevStack
from embedq_sdk.embeddings import Vectors
from embedq_shared.topics import Topics
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.lazily import lazily
from tests.helpers.s3_server import BUCKET, s3_server
from tests.helpers.service_process import Replica, fresh_prefix, make_topics
from tests.helpers.support import patient, wait_until

if TYPE_CHECKING:
    import openai
    from openai.types import Batch
else:
    openai = lazily("openai")

pytestmark = [pytest.mark.kafka, pytest.mark.asyncio(loop_scope="session")]

TEXTS = [f"{n} tides turn twice a day" for n in range(40)]


def client_of(gateway: GatewayProcess) -> openai.AsyncOpenAI:
    """With its defaults, but for the time that a busy machine takes."""
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=patient(60.0))


def jsonl(bodies: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(
        json.dumps(
            {"custom_id": f"row-{n}", "method": "POST", "url": "/v1/embeddings", "body": body}
        ).encode()
        + b"\n"
        for n, body in enumerate(bodies)
    )


async def begin(client: openai.AsyncOpenAI, data: bytes, **more: Any) -> Batch:
    file = await client.files.create(file=("rows.jsonl", data), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **more
    )


async def ended(client: openai.AsyncOpenAI, batch: Batch, within: float = 60.0) -> Batch:
    async def is_over() -> bool:
        found = await client.batches.retrieve(batch.id)
        return found.status in ("completed", "failed", "expired", "cancelled")

    await wait_until(is_over, within=within, what="the batch's end")
    return await client.batches.retrieve(batch.id)


async def lines(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file by their custom id, which each must have for itself."""
    if file_id is None:
        return {}
    content = await client.files.content(file_id)
    found = [json.loads(line) for line in content.text.splitlines()]
    assert [name for name, count in Counter(line["custom_id"] for line in found).items() if count > 1] == []
    return {line["custom_id"]: line for line in found}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two answers agree in all but rounding: texts that share a micro-batch with others round differently in the last bits."""
    mine, theirs = (
        np.array([vector(each.pop("embedding")) for each in answer["data"]]) for answer in (one, other)
    )
    assert one == other
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def vector(written: str | list[float]) -> Vectors:
    """As numbers or as base64."""
    if isinstance(written, str):
        return np.frombuffer(base64.b64decode(written), dtype="<f4")
    return np.array(written, dtype=np.float32)


async def test_openais_client_runs_a_batch_and_its_vectors_are_those_of_single_requests(
    gateway: GatewayProcess,
) -> None:
    bodies: list[dict[str, Any]] = [{"model": "default", "input": text} for text in TEXTS]
    bodies[3]["dimensions"] = 64
    bodies[5] = {"model": "default", "input": TEXTS[:4], "encoding_format": "base64"}
    bodies[7] = {"model": "nobody", "input": "a"}
    bodies[8] = {"model": "default", "input": "moon " * 300}
    bodies[9] = {"model": "default", "inputs": "a"}
    async with client_of(gateway) as client:
        batch = await begin(client, jsonl(bodies), metadata={"run": "7"})
        assert batch.status == "validating"
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.metadata == {"run": "7"}
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 40, "completed": 37, "failed": 3}
        output = await lines(client, batch.output_file_id)
        errors = await lines(client, batch.error_file_id)
        assert output.keys() | errors.keys() == {f"row-{n}" for n in range(40)}

        async with gateway.http() as http:
            for n in (0, 3, 5, 39):
                single = await http.post("/v1/embeddings", json=bodies[n])
                assert output[f"row-{n}"]["response"]["status_code"] == 200
                assert_same(output[f"row-{n}"]["response"]["body"], single.json())
            for n, status in ((7, 404), (8, 413), (9, 400)):
                single = await http.post("/v1/embeddings", json=bodies[n])
                assert single.status_code == status
                assert errors[f"row-{n}"]["response"]["status_code"] == status
                refused = errors[f"row-{n}"]["response"]["body"]["error"]
                assert (refused["code"], refused["param"]) == (
                    single.json()["error"]["code"],
                    single.json()["error"]["param"],
                )
        versions = {line["response"]["body"]["model_version"] for line in output.values()}
        assert batch.to_dict()["model_versions"] == {versions.pop(): 37}
        assert batch.usage is not None
        assert batch.usage.input_tokens == sum(
            line["response"]["body"]["usage"]["total_tokens"] for line in output.values()
        )


async def test_openais_client_lists_retrieves_and_deletes(gateway: GatewayProcess) -> None:
    async with client_of(gateway) as client:
        made = [await begin(client, jsonl([{"input": f"{n}"}])) for n in range(5)]
        listed = [each.id async for each in client.batches.list(limit=2)]
        assert listed[:5] == [batch.id for batch in reversed(made)]
        for batch in made:
            assert (await ended(client, batch)).status == "completed"
        files = [each async for each in client.files.list(limit=3, purpose="batch")]
        assert [each.id for each in files[:5]] == [batch.input_file_id for batch in reversed(made)]
        assert files[0].to_dict() == (await client.files.retrieve(files[0].id)).to_dict()
        deleted = await client.files.delete(files[0].id)
        assert deleted.deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(files[0].id)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(files[0].id)


async def test_a_file_that_is_no_batch_is_refused_with_its_lines(gateway: GatewayProcess) -> None:
    async with client_of(gateway) as client:
        batch = await ended(client, await begin(client, jsonl([{"input": "a"}]) * 2 + b"{}\n"))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [(error.code, error.line) for error in batch.errors.data or ()] == [
            ("duplicate_custom_id", 2),
            ("missing_required_parameter", 3),
        ]


async def test_a_cancelled_batch_says_of_each_line_that_it_was_not_run(
    stack: DevStack, tmp_path: Path
) -> None:
    """There is no replica, so jobs wait until the batch is cancelled."""
    topics = await make_topics(stack, fresh_prefix())
    alone = GatewayProcess(stack, topics, tmp_path / "gateway.log", files=tmp_path / "files", batch_lease_s=2)
    async with running(alone, connected=False), client_of(alone) as client:
        batch = await begin(client, jsonl([{"input": text} for text in TEXTS]))

        async def runs() -> bool:
            return (await client.batches.retrieve(batch.id)).status == "in_progress"

        await wait_until(runs, what="the batch's beginning")
        with pytest.raises(openai.BadRequestError, match="cancel it first"):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.output_file_id is None
        errors = await lines(client, batch.error_file_id)
        assert errors.keys() == {f"row-{n}" for n in range(len(TEXTS))}
        assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
        failed = await ended(client, await begin(client, b"nonsense"))
        with pytest.raises(openai.BadRequestError, match="the batch is failed"):
            await client.batches.cancel(failed.id)


LITELLM = """
import json, sys, time
import litellm

url, rows = sys.argv[1:]
to = {"custom_llm_provider": "openai", "api_base": url, "api_key": "none"}
file = litellm.create_file(file=("rows.jsonl", rows.encode()), purpose="batch", **to)
batch = litellm.create_batch(
    completion_window="24h", endpoint="/v1/embeddings", input_file_id=file.id, metadata={"by": "x"}, **to
)
while batch.status != "completed":
    time.sleep(0.1)
    batch = litellm.retrieve_batch(batch_id=batch.id, **to)
content = litellm.file_content(file_id=batch.output_file_id, **to).content
print(json.dumps({
    "ids": [json.loads(line)["custom_id"] for line in content.splitlines()],
    "listed": batch.id in [each.id for each in litellm.list_batches(limit=10, **to).data],
    "retrieved": litellm.file_retrieve(file_id=file.id, **to).id == file.id,
    "files": file.id in [each.id for each in litellm.file_list(**to)],
    "deleted": litellm.file_delete(file_id=file.id, **to).deleted,
}))
"""


@pytest.mark.slow
async def test_litellms_batch_calls(gateway: GatewayProcess) -> None:
    """In a process of its own, since its import is long, and it leaves connections open."""
    rows = jsonl([{"model": "default", "input": text} for text in TEXTS[:5]]).decode()
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LITELLM, f"{gateway.url}/v1", rows),
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the network for prices
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(patient(90)):
        out, err = await program.communicate()
    assert program.returncode == 0, err.decode()
    found = json.loads(out.splitlines()[-1])
    assert sorted(found.pop("ids")) == [f"row-{n}" for n in range(5)]
    assert found == {"listed": True, "retrieved": True, "files": True, "deleted": True}


async def test_curl_s_upload_is_as_good(gateway: GatewayProcess) -> None:
    """The file first and the purpose after it, as `curl -F file=@rows.jsonl -F purpose=batch` sends them."""
    boundary = b"x"
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n{}\n\r\n'
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    )
    async with gateway.http() as http:
        kind = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
        answer = await http.post("/v1/files", content=body, headers=kind)
        assert answer.status_code == 200, answer.text
        assert answer.json()["bytes"] == 3
        content = await http.get(f"/v1/files/{answer.json()['id']}/content")
        assert content.content == b"{}\n"


async def killed_half_way(stack: DevStack, topics: Topics, folder: Path, count: int, place: str) -> None:
    """A batch whose gateway is killed with SIGKILL once half of it is done, and another gateway goes on."""
    settings: dict[str, Any] = {"files": place, "batch_lease_s": 3, "access_log": False}
    first = GatewayProcess(stack, topics, folder / "first.log", **settings)
    try:
        await first.start()
        async with client_of(first) as client:
            batch = await begin(client, jsonl([{"input": f"{n} tides"} for n in range(count)]))

            async def half() -> bool:
                counts = (await client.batches.retrieve(batch.id)).request_counts
                return counts is not None and count // 2 <= counts.completed

            await wait_until(half, within=300, what="half of the batch")
    finally:
        first.kill()
        await first.ended()
    second = GatewayProcess(stack, topics, folder / "second.log", **settings)
    async with running(second), client_of(second) as client:
        assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        batch = await ended(client, batch, within=300)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": count, "completed": count, "failed": 0}
        output = await lines(client, batch.output_file_id)
        assert output.keys() == {f"row-{n}" for n in range(count)}
        assert batch.error_file_id is None


@pytest.mark.slow
async def test_a_batch_whose_gateway_is_killed_half_way_is_completed_by_the_next_one(
    stack: DevStack, topics: Topics, replica: Replica, tmp_path: Path
) -> None:
    await killed_half_way(stack, topics, tmp_path, 4000, str(tmp_path / "files"))


@pytest.mark.slow
async def test_so_it_is_with_s3(
    stack: DevStack, topics: Topics, replica: Replica, tmp_path: Path, s3: None
) -> None:
    await killed_half_way(stack, topics, tmp_path, 4000, f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that speaks S3, as boto3 finds it."""
    with s3_server() as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        yield
