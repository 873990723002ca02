"""What surrounds every request: ids, errors, who has gone, and what is seen of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import pytest

from embedq_gateway.app import Gateway
from embedq_gateway.http import logs
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.entrance import HUNG_UP, route
from embedq_gateway.http.exchange import Exchange
from tests.helpers.fake_gateway import Door, a_gateway
from tests.helpers.support import patient, wait_until


async def test_a_request_id_is_given_back_or_made(door: Door) -> None:
    answer = await door.post("/v1/embeddings", {"input": "a"}, x_request_id="req_1-a:b")
    assert answer.headers["x-request-id"] == "req_1-a:b"
    made = {(await door.http.get("/livez")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("given", ['a"b', "a b", "x" * 129, ""])
async def test_an_id_that_could_spoil_a_log_is_replaced(door: Door, given: str) -> None:
    answer = await door.http.get("/livez", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] not in (given, "")


async def test_a_path_that_is_not_there_is_404(door: Door) -> None:
    answer = await door.http.get("/v2/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_another_method_is_405_and_says_which(door: Door) -> None:
    answer = await door.http.get("/v1/embeddings")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


def broken(gateway: Gateway) -> None:
    async def fail(exchange: Exchange) -> JsonAnswer:
        raise ValueError("the secret of the house")

    gateway.entrance._router.routes.append(route("/broken", fail))


async def test_a_fault_of_ours_is_500_and_tells_nobody_why() -> None:
    async with a_gateway(change=broken) as door:
        answer = await door.http.get("/broken")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "gateway_fault"
        assert "secret" not in answer.text


async def test_while_leaving_answers_close_their_connections(door: Door) -> None:
    assert "connection" not in (await door.http.get("/livez")).headers
    door.gateway.entrance.closing = True
    assert (await door.http.get("/livez")).headers["connection"] == "close"


async def test_every_request_is_seen_once_at_its_end(door: Door) -> None:
    seen: list[Exchange] = []
    door.gateway.entrance.observers.append(seen.append)
    await door.post("/v1/embeddings", {"input": ["a b", "c"]})
    await door.post("/v1/embeddings", {"input": 3})
    await door.http.get("/nowhere")
    assert [(each.route, each.status, each.error) for each in seen] == [
        ("/v1/embeddings", 200, None),
        ("/v1/embeddings", 400, "invalid_value"),
        ("", 404, "not_found"),
    ]
    first = seen[0]
    assert (first.texts, first.tokens, first.caller and first.caller.name) == (2, 3, "anybody")
    assert first.received_bytes > 0
    assert first.sent_bytes > 0
    assert not door.gateway.entrance.in_flight


async def test_a_line_in_the_log_for_each_request_and_no_text_in_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        logs.configure("info", stream=stream)
        await door.post("/v1/embeddings", {"input": "a private text"}, x_request_id="r-1")
        await door.post("/v1/embeddings", {"input": "x", "private": 1})
    finally:
        root.handlers[:], root.level = before
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    found = [line for line in lines if line["event"] == "request"]
    assert [(line["route"], line["status"], line["error"]) for line in found] == [
        ("/v1/embeddings", 200, None),
        ("/v1/embeddings", 400, "unknown_field"),
    ]
    assert found[0]["request_id"] == "r-1"
    assert found[0]["tokens"] == 3
    assert "private text" not in stream.getvalue()


class RawRequest:
    """A request spoken in ASGI itself, whose client can hang up."""

    def __init__(self, body: bytes) -> None:
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.sent: list[Any] = []
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
            "root_path": "",
        }

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})


async def test_a_client_that_hangs_up_ends_its_job_and_gets_no_answer(door: Door) -> None:
    seen: list[Exchange] = []
    door.gateway.entrance.observers.append(seen.append)
    door.service.behave = lambda received: None
    request = RawRequest(b'{"input": "a"}')
    task = asyncio.create_task(door.gateway.entrance(request.scope, request.incoming.get, request.send))
    await wait_until(lambda: door.gateway.client.in_flight == 1, what="a job under way")
    request.hang_up()
    async with asyncio.timeout(patient(10)):
        await task
    assert request.sent == []
    assert [each.status for each in seen] == [HUNG_UP]
    assert door.gateway.client.in_flight == 0
    assert door.transport.sent[0].future.cancelled()


async def test_a_client_that_hangs_up_within_its_body_gets_no_answer(door: Door) -> None:
    request = RawRequest(b"")
    await request.incoming.get()
    request.incoming.put_nowait({"type": "http.request", "body": b'{"in', "more_body": True})
    request.hang_up()
    await door.gateway.entrance(request.scope, request.incoming.get, request.send)
    assert request.sent == []
