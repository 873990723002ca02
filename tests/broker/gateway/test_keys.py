"""A gateway with keys, as a process in front of a real Kafka: what each request that must be refused gets, and what a key may do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from embedq_gateway.keys.key_file import KeyEntry, add_key, hash_of, remove_key
from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers.gateway_process import GatewayProcess, running
from tests.helpers.lazily import lazily
from tests.helpers.service_process import Replica
from tests.helpers.support import patient, wait_until

if TYPE_CHECKING:
    import openai
else:
    openai = lazily("openai")

pytestmark = [pytest.mark.kafka, pytest.mark.asyncio(loop_scope="session")]

MEGABYTE = 1_000_000


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def entry(name: str, **rights: Any) -> KeyEntry:
    """A key that is called like its owner."""
    return KeyEntry(name=name, hash=hash_of(name), **rights)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gateway-keys") / "keys.json"
    add_key(path, entry("search"))
    add_key(path, entry("narrow", aliases=("default",), lane="bulk"))
    add_key(path, entry("poor", tokens_per_minute=100))
    add_key(path, entry("ops", scopes=("admin",)))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(
    stack: DevStack,
    topics: Topics,
    replica: Replica,
    keys_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[GatewayProcess]:
    """Two workers behind keys."""
    log = tmp_path_factory.mktemp("guarded") / "gateway.log"
    gateway = GatewayProcess(
        stack, topics, log, keys_file=keys_file, workers=2, host="0.0.0.0", head_timeout_s=patient(30)
    )
    async with running(gateway, connected=False) as started:
        async with started.http(headers=bearer("search")) as http:

            async def answers() -> bool:
                try:
                    answer = await http.post("/v1/embeddings", json={"input": "is it there?"})
                except httpx.TransportError:
                    return False
                return answer.status_code == 200 and started.all_connected()

            await wait_until(answers, within=60, what="a gateway behind keys whose workers answer")
        yield started


async def hundred_megabytes() -> AsyncIterator[bytes]:
    for _ in range(100):
        yield bytes(MEGABYTE)


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({}, {"input": "a"}, 401, "invalid_api_key"),
        (bearer("wrong"), {"input": "a"}, 401, "invalid_api_key"),
        (bearer("ops"), {"input": "a"}, 403, "permission_denied"),
        (bearer("narrow"), {"input": "a", "model": "other"}, 403, "permission_denied"),
        (bearer("narrow") | {"x-embedq-lane": "interactive"}, {"input": "a"}, 403, "permission_denied"),
        (bearer("search"), {"input": "a", "model": "other"}, 404, "unknown_model"),
        (bearer("search"), b'{"input": "a"', 400, "malformed"),
        (bearer("search"), b"\xff\xfe", 400, "malformed"),
        (bearer("search"), {"inputs": "a"}, 400, "unknown_field"),
        (bearer("search"), {"input": "w " * 1000}, 413, "text_too_long"),
        (bearer("search"), bytes(100 * MEGABYTE), 413, "body_too_large"),
        (bearer("search"), hundred_megabytes, 413, "body_too_large"),
        (bearer("search") | {"x-long": "a" * 40_000}, {"input": "a"}, 431, "head_too_large"),
    ],
    ids=[
        "no key", "wrong key", "missing scope", "another model's key", "another lane's key", "unknown model",
        "broken JSON", "no text", "unknown field", "text too long", "100 MB that say so", "100 MB that do not", "long head",
    ],
)  # fmt: skip
async def test_what_is_refused_gets_its_documented_status_and_code(
    guarded: GatewayProcess, headers: dict[str, str], body: Any, status: int, code: str
) -> None:
    content: dict[str, Any] = {"json": body}
    if not isinstance(body, dict):
        content = {"content": body if isinstance(body, bytes) else body()}
        headers = headers | {"content-type": "application/json"}
    async with guarded.http() as http:
        answer = await http.post("/v1/embeddings", headers=headers, **content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_over_its_limit_openais_client_is_told_when_to_come_again(guarded: GatewayProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key="poor", max_retries=0) as client:

        async def often() -> None:
            for _ in range(10):  # two workers, each with its half
                await client.embeddings.create(model="default", input="some words that cost tokens")

        with pytest.raises(openai.RateLimitError) as refused:
            await often()
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) < 60


async def test_a_key_comes_and_goes_while_the_gateway_runs(guarded: GatewayProcess, keys_file: Path) -> None:
    async def status() -> int:
        async with guarded.http() as http:  # a connection anew: to either worker
            return (await http.get("/v1/models", headers=bearer("new"))).status_code

    async def always(expected: int) -> bool:
        return all([await status() == expected for _ in range(8)])

    assert await status() == 401
    await asyncio.to_thread(add_key, keys_file, entry("new"))
    await wait_until(lambda: always(200), what="the new key in both workers")
    text = keys_file.read_text()
    keys_file.write_text(text[:-20])
    await wait_until(
        lambda: sum(event["event"] == "key_file_refused" for event in guarded.events()) == 2,
        what="both workers saying that the file is broken",
    )
    assert await always(200)
    keys_file.write_text(text)
    await asyncio.to_thread(remove_key, keys_file, "new")
    await wait_until(lambda: always(401), what="the key gone from both workers")


async def test_a_scrape_of_any_worker_shows_both_and_probes_need_no_key(guarded: GatewayProcess) -> None:
    async def page() -> str:
        async with guarded.http(headers=bearer("ops")) as http:
            return (await http.get("/metrics")).text

    def of(page: str, sample: str) -> float:
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(sample))

    before = await page()
    for _ in range(8):
        async with guarded.http(headers=bearer("search")) as http:
            assert (await http.post("/v1/embeddings", json={"input": ["a", "b"]})).status_code == 200
    after = await page()
    texts = 'embedq_gateway_texts_total{key="search"}'
    answered = 'embedq_gateway_requests_total{route="/v1/embeddings",status="200"}'
    assert of(after, texts) - of(before, texts) == 16
    assert of(after, answered) - of(before, answered) == 8
    assert of(after, "embedq_gateway_ready") == 2
    async with guarded.http() as http:
        assert (await http.get("/readyz")).json() == {"status": "ok"}
        assert (await http.get("/metrics")).status_code == 401


async def test_the_status_has_replicas_and_lag_and_a_reload_is_told_to_its_end(
    guarded: GatewayProcess, model: Path
) -> None:
    async with guarded.http(headers=bearer("ops")) as http:

        async def lag_is_known() -> bool:
            return (await http.get("/admin/status")).json()["lag"] is not None

        await wait_until(lag_is_known, what="the lag")
        status = (await http.get("/admin/status")).json()
        assert status["fresh"]
        assert [(each["alias"], each["state"]) for each in status["replicas"]] == [("default", "READY")]
        assert status["lag"].keys() == {"interactive", "bulk"}
        names = []
        async with http.stream("POST", "/admin/reload", json={"path": str(model)}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    names.append(line.removeprefix("event: "))
                if line.startswith("data: "):
                    last = line
        assert names[-1] == "done", names
        assert '"progress":"ready"' in last
        assert "update" in names


async def test_no_key_and_no_text_is_in_the_log(guarded: GatewayProcess) -> None:
    async with guarded.http() as http:
        await http.post("/v1/embeddings", json={"input": "a private text"}, headers=bearer("search"))
        await http.post("/v1/embeddings", json={"input": "a private text"}, headers=bearer("a-wrong-key"))
    lines = [event for event in guarded.events() if event["event"] == "request"]
    assert {line["caller"] for line in lines} >= {"search", None}
    log = guarded.log.read_text()
    assert "private text" not in log
    assert "a-wrong-key" not in log
    assert hash_of("search") not in log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "EMBEDQ_GATEWAY_HOST: expected a loopback address"),
        ({"keys_file": "/nowhere/keys.json"}, "EMBEDQ_GATEWAY_KEYS_FILE: /nowhere/keys.json cannot be read"),
    ],
)
async def test_an_open_door_and_a_missing_file_end_the_start(
    stack: DevStack, topics: Topics, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    gateway = GatewayProcess(stack, topics, tmp_path / "gateway.log", **settings)
    with pytest.raises(AssertionError, match="ended with 2"):
        await gateway.start(connected=False)
    assert said in gateway.log.read_text()


async def test_while_kafka_is_away_it_is_alive_and_not_ready_and_requests_get_503(
    stack: DevStack, topics: Topics, tmp_path: Path
) -> None:
    gateway = GatewayProcess(stack, topics, tmp_path / "gateway.log")
    gateway._environ["EMBEDQ_KAFKA_SERVERS"] = "127.0.0.1:1"
    async with running(gateway, connected=False), gateway.http() as http:
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "Kafka does not answer")
        refused = await http.post("/v1/embeddings", json={"input": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["retry-after"] == "1"
        reload = await http.post("/admin/reload", json={"path": "m"})
        assert (reload.status_code, reload.json()["error"]["code"]) == (503, "unavailable")
        assert "127.0.0.1:1" not in refused.text + reload.text
