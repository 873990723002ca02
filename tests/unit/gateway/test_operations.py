"""Metrics, probes, status and reloads as operators see them, over a fake service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from embedq_gateway.app import Gateway
from embedq_gateway.errors import ApiError
from embedq_gateway.keys import KeyEntry
from embedq_gateway.keys.key_file import add_key, hash_of
from embedq_gateway.operations.admin import ReloadRequest
from embedq_gateway.operations.health import not_ready
from embedq_gateway.operations.metrics import DIRECTORY, GatewayMetrics, forget_the_dead
from embedq_gateway.operations.sse import events
from embedq_sdk.admin import LostRace, RolloutUpdate
from embedq_sdk.errors import KafkaUnavailable
from tests.helpers.fake_gateway import Door, a_gateway
from tests.helpers.support import patient

EMBED = {"authorization": "Bearer embed-key"}
ADMIN = {"authorization": "Bearer admin-key"}
SCRAPE = {"authorization": "Bearer scrape-key"}


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    add_key(
        path, KeyEntry(name="search", hash=hash_of("embed-key"), aliases=("default",), tokens_per_minute=10)
    )
    add_key(path, KeyEntry(name="ops", hash=hash_of("admin-key"), scopes=("admin",)))
    add_key(path, KeyEntry(name="prometheus", hash=hash_of("scrape-key"), scopes=("metrics",)))
    return str(path)


def value(page: str, sample: str) -> float:
    """Of a line on the metrics page."""
    found = [line.rpartition(" ")[2] for line in page.splitlines() if line.rpartition(" ")[0] == sample]
    assert len(found) == 1, f"{sample} is there {len(found)} times"
    return float(found[0])


def connected(gateway: Gateway) -> None:
    gateway.follower.fresh = lambda now: True  # type: ignore[method-assign]


# -- metrics -----------------------------------------------------------------------------------------------------------


async def test_each_metric_has_its_value(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file, change=connected) as door:
        body = {"input": ["a b", "c"]}
        assert (await door.http.post("/v1/embeddings", json=body, headers=EMBED)).status_code == 200
        assert (await door.http.post("/v1/embeddings", json=body)).status_code == 401
        assert (await door.http.get("/admin/status", headers=EMBED)).status_code == 403
        assert (
            await door.http.post("/v1/embeddings", json={"input": "x" * 400}, headers=EMBED)
        ).status_code == 429
        await door.http.get("/no/such/path")
        door.gateway.metrics.key_file_readings.labels("refused").inc()
        door.gateway.metrics.key_file_broken.set(1)
        door.gateway.connections.ended()
        door.gateway.measure()
        page = (await door.http.get("/metrics", headers=SCRAPE)).text
    for sample, expected in {
        'embedq_gateway_requests_total{route="/v1/embeddings",status="200"}': 1,
        'embedq_gateway_requests_total{route="/v1/embeddings",status="401"}': 1,
        'embedq_gateway_requests_total{route="other",status="404"}': 1,
        'embedq_gateway_request_seconds_count{route="/v1/embeddings"}': 3,
        'embedq_gateway_texts_total{key="search"}': 2,
        'embedq_gateway_tokens_total{key="search"}': 3,
        'embedq_gateway_refused_total{code="invalid_api_key",key="none"}': 1,
        'embedq_gateway_refused_total{code="permission_denied",key="search"}': 1,
        'embedq_gateway_refused_total{code="rate_limit_exceeded",key="search"}': 1,
        "embedq_gateway_in_flight": 0,
        'embedq_gateway_connections{state="busy"}': 0,
        'embedq_gateway_connections{state="idle"}': 0,
        "embedq_gateway_connections_ended_total": 1,
        'embedq_gateway_key_file_readings_total{outcome="refused"}': 1,
        "embedq_gateway_key_file_broken": 1,
        "embedq_gateway_ready": 1,
    }.items():
        assert value(page, sample) == expected, sample
    assert "process_resident_memory_bytes" in page


async def test_a_path_that_a_request_invents_is_no_label(door: Door) -> None:
    for path in ("/a", "/b", "/v1/models/a-name"):
        await door.http.get(path)
    page = (await door.http.get("/metrics")).text
    routes = {
        line.partition('route="')[2].partition('"')[0] for line in page.splitlines() if "route=" in line
    }
    assert routes <= {"other", "/v1/models/{id:path}", "/v1/models/{alias:path}"}


SHARED = """
import os, sys
from embedq_gateway.operations.metrics import GatewayMetrics
metrics = GatewayMetrics()
metrics.tokens.labels("search").inc(int(sys.argv[1]))
metrics.measure(in_flight=3, busy=1, idle=2, ready=True)
print(metrics.tokens_so_far(), flush=True)
sys.stdin.readline()
"""


def test_workers_share_their_metrics_and_one_that_ended_is_no_longer_ready(tmp_path: Path) -> None:
    def worker(tokens: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SHARED, str(tokens)],
            env={"PATH": "", "PYTHONPATH": ":".join(sys.path), DIRECTORY: str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with worker(5) as one, worker(7) as two:
        for each in (one, two):
            assert each.stdout is not None
            assert each.stdout.readline().strip() in ("5.0", "7.0", "12.0")
        page = GatewayMetrics(str(tmp_path)).page("")[1].decode()
        assert value(page, 'embedq_gateway_tokens_total{key="search"}') == 12
        assert value(page, "embedq_gateway_ready") == 2
        two.kill()
        two.wait()
        forget_the_dead(str(tmp_path))
        metrics = GatewayMetrics(str(tmp_path))
        page = metrics.page("")[1].decode()
        assert value(page, "embedq_gateway_ready") == 1
        assert value(page, "embedq_gateway_in_flight") == 3
        assert metrics.tokens_so_far() == 12, "what it had counted stays counted"
        one.kill()


# -- probes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"leaving": True}, "leaving"),
        ({"answering": False}, "Kafka does not answer"),
        ({"fresh": False}, "Kafka does not answer"),
        ({"serving": 0}, "no live replica serves `default`"),
    ],
)
def test_a_gateway_is_ready_unless_there_is_a_reason(changed: dict[str, Any], reason: str | None) -> None:
    known: dict[str, Any] = {
        "leaving": False, "answering": True, "fresh": True, "alias": "default", "serving": 1,
    }  # fmt: skip
    assert not_ready(**(known | changed)) == reason


async def test_readiness_is_a_page(door: Door) -> None:
    answer = await door.http.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "Kafka does not answer")
    connected(door.gateway)
    assert (await door.http.get("/readyz")).json() == {"status": "ok"}
    door.see(state="STOPPED", serving=False)
    answer = await door.http.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no live replica serves `default`")
    door.gateway.entrance.closing = True
    assert (await door.http.get("/readyz")).json()["reason"] == "leaving"
    assert (await door.http.get("/livez")).status_code == 200


async def test_probes_need_no_key_and_everything_else_does(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file) as door:
        for path in ("/livez", "/readyz", "/"):
            assert (await door.http.get(path)).status_code != 401, path
        for path, scopes in {
            "/metrics": {"prometheus", "ops"},
            "/admin/status": {"ops"},
            "/v1/models": {"search"},
        }.items():
            assert (await door.http.get(path)).status_code == 401, path
            for name, headers in (("search", EMBED), ("ops", ADMIN), ("prometheus", SCRAPE)):
                status = (await door.http.get(path, headers=headers)).status_code
                assert status == (200 if name in scopes else 403), (path, name)


# -- keys in front of requests -----------------------------------------------------------------------------------------


async def test_a_key_may_use_its_models_and_no_other(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file) as door:
        door.see("r2", alias="other")
        answer = await door.http.post("/v1/embeddings", json={"input": "a", "model": "other"}, headers=EMBED)
        assert answer.status_code == 403
        assert answer.json()["error"] == {
            "message": "this API key may use default, and no other model",
            "type": "permission_error",
            "param": "model",
            "code": "permission_denied",
        }
        models = (await door.http.get("/v1/models", headers=EMBED)).json()["data"]
        assert [model["id"] for model in models] == ["default"]


async def test_answers_tell_of_the_limits_and_what_is_over_them_when_to_come_again(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file) as door:
        answer = await door.http.post("/v1/embeddings", json={"input": "a b c d e f g h"}, headers=EMBED)
        assert answer.headers["x-ratelimit-limit-tokens"] == "10"
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert left == 10 - answer.json()["usage"]["total_tokens"]
        refused = await door.http.post("/v1/embeddings", json={"input": "a" * 40}, headers=EMBED)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 0 < int(refused.headers["retry-after"]) <= 60


async def test_the_jobs_of_a_key_take_turns_under_its_name(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file) as door:
        await door.http.post("/v1/embeddings", json={"input": "a"}, headers=EMBED)
        assert ("client-id", b"key:search") in door.transport.sent[0].headers


# -- status and reloads ------------------------------------------------------------------------------------------------


async def test_the_status_says_how_replicas_stand_and_which_keys_there_are(keys_file: str) -> None:
    async with a_gateway(keys_file=keys_file, change=connected) as door:
        door.gateway.history.add(10, {"interactive": 1, "bulk": 0}, tokens=0)
        door.gateway.history.add(20, {"interactive": 4, "bulk": 2}, tokens=50)
        found = (await door.http.get("/admin/status", headers=ADMIN)).json()
    assert found["fresh"] is True
    assert [(replica["replica"], replica["state"]) for replica in found["replicas"]] == [("r1", "READY")]
    assert found["models"][0]["alias"] == "default"
    assert found["lag"] == {"interactive": 4, "bulk": 2}
    assert found["history"] == [{"at": 20.0, "lag": {"interactive": 4, "bulk": 2}, "tokens_per_s": 5.0}]
    assert found["keys"] == {"names": ["ops", "prometheus", "search"], "fault": None}


def an_update(progress: Any = "running") -> RolloutUpdate:
    return RolloutUpdate(alias="default", version=3, command_id="c", progress=progress, replicas=())


def follows(*news: RolloutUpdate | Exception) -> Any:
    """What takes the SDK's place: it yields these, and raises what is an exception."""
    asked: list[ReloadRequest] = []

    async def reload(request: ReloadRequest) -> AsyncGenerator[RolloutUpdate, None]:
        asked.append(request)
        for each in news:
            if isinstance(each, Exception):
                raise each
            yield each

    def change(gateway: Gateway) -> None:
        gateway.admin._reload = reload

    change.asked = asked  # type: ignore[attr-defined]
    return change


def told(answer: httpx.Response) -> list[tuple[str, Any]]:
    """The events of an answer."""
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        if block.startswith("event: "):
            name, data = block.removeprefix("event: ").split("\ndata: ")
            found.append((name, msgspec.json.decode(data)))
    return found


async def test_a_reload_is_told_step_by_step() -> None:
    change = follows(an_update(), an_update("ready"))
    async with a_gateway(change=change) as door:
        answer = await door.post("/admin/reload", {"path": "m2", "policy": "resource", "min_cosine": 0.9})
    assert answer.headers["content-type"] == "text/event-stream"
    assert [(name, data["progress"]) for name, data in told(answer)] == [
        ("update", "running"),
        ("done", "ready"),
    ]
    [asked] = change.asked
    assert (asked.path, asked.policy, asked.min_cosine, asked.alias) == ("m2", "resource", 0.9, "default")


@pytest.mark.parametrize(
    ("news", "status", "code"),
    [
        ([LostRace(alias="default")], 409, "superseded"),
        ([KafkaUnavailable(servers="secret:9092", reason="gone")], 503, "unavailable"),
    ],
)
async def test_what_fails_before_the_first_step_is_the_answers_status(
    news: list[Exception], status: int, code: str
) -> None:
    async with a_gateway(change=follows(*news)) as door:
        answer = await door.post("/admin/reload", {"path": "m2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text


async def test_what_fails_later_is_the_last_event() -> None:
    gone = KafkaUnavailable(servers="secret:9092", reason="gone")
    async with a_gateway(change=follows(an_update(), gone)) as door:
        events = told(await door.post("/admin/reload", {"path": "m2"}))
    assert [name for name, _ in events] == ["update", "error"]
    assert events[1][1]["error"]["code"] == "unavailable"
    assert "secret" not in str(events)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_value"),
        ({"path": ""}, "invalid_value"),
        ({"path": "m", "policy": "fast"}, "invalid_value"),
        ({"path": "m", "min_cosine": 2}, "invalid_value"),
        ({"path": "m", "digets": "x"}, "invalid_value"),
        ([], "invalid_value"),
    ],
)
async def test_a_wrong_command_is_refused(body: Any, code: str) -> None:
    change = follows(an_update("ready"))
    async with a_gateway(change=change) as door:
        answer = await door.post("/admin/reload", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert change.asked == []


async def test_so_many_reloads_are_watched_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_gateway.operations.admin._MOST_STREAMS", 0)
    async with a_gateway(change=follows(an_update("ready"))) as door:
        answer = await door.post("/admin/reload", {"path": "m2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


async def silence() -> AsyncGenerator[int, None]:
    await asyncio.Event().wait()
    yield 1


async def test_silence_is_filled_and_ends_when_the_process_leaves() -> None:
    leaving = asyncio.Event()
    stream = events(silence(), name=str, failed=str, leaving=leaving, sign_of_life_s=0.01)
    async with asyncio.timeout(patient(10)):
        assert await anext(stream) == b": no news\n\n"
        leaving.set()
        rest = [chunk async for chunk in stream]
    assert rest[-1] == b"event: leaving\ndata: {}\n\n"


async def test_an_error_of_our_own_kind_is_an_event_and_others_are_faults() -> None:
    async def fails(error: Exception) -> AsyncGenerator[int, None]:
        yield 1
        raise error

    def stream(error: Exception) -> AsyncGenerator[bytes, None]:
        return events(fails(error), name=str, failed=lambda error: {"e": str(error)}, leaving=asyncio.Event())

    found = [chunk async for chunk in stream(ApiError("overloaded", "full"))]
    assert found[-1] == b'event: error\ndata: {"e":"full"}\n\n'
    with pytest.raises(ValueError, match="x"):
        [chunk async for chunk in stream(ValueError("x"))]


# -- the console -------------------------------------------------------------------------------------------------------


async def test_the_page_and_its_parts_come_from_this_package_under_a_strict_policy(door: Door) -> None:
    for path, content_type in {
        "/": "text/html",
        "/console/console.js": "text/javascript",
        "/console/console.css": "text/css",
        "/console/icon.svg": "image/svg+xml",
    }.items():
        answer = await door.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(content_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        without_namespaces = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in without_namespaces.replace("// ", ""), f"{path} names an address"
        again = await door.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
