"""What surrounds every request: ids, errors, who has gone, and what is seen of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from embedq_gateway.app import Gateway
from embedq_gateway.http import logs
from embedq_gateway.http.access_log import AccessLog
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
    several = await door.http.put("/v1/batches")
    assert several.headers["allow"] == "GET, HEAD, POST"


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


async def test_a_line_in_the_log_for_each_request_and_no_text_in_it(door: Door) -> None:
    stream = io.BytesIO()
    access_log = AccessLog(stream)
    door.gateway.entrance.observers.append(access_log)
    await door.post("/v1/embeddings", {"input": "a private text"}, x_request_id="r-1")
    await door.post("/v1/embeddings", {"input": "x", "private": 1})
    await wait_until(lambda: len(stream.getvalue().splitlines()) == 2, what="both lines")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["route"], line["status"], line["error"]) for line in found] == [
        ("/v1/embeddings", 200, None),
        ("/v1/embeddings", 400, "unknown_field"),
    ]
    assert found[0]["request_id"] == "r-1"
    assert found[0]["tokens"] == 3
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found[0]["timestamp"])
    assert b"private text" not in stream.getvalue()


async def test_lines_are_written_whole_and_in_pieces_that_a_pipe_keeps_together(door: Door) -> None:
    class Pieces(io.BytesIO):
        def write(self, piece: Any) -> int:
            pieces.append(bytes(piece))
            return len(piece)

    pieces: list[bytes] = []
    access_log = AccessLog(Pieces())
    door.gateway.entrance.observers.append(access_log)
    for _ in range(40):
        await door.http.get("/livez")
    access_log.flush()
    assert len(pieces) > 1
    assert all(len(piece) <= 4096 and piece.endswith(b"\n") for piece in pieces)
    assert len(b"".join(pieces).splitlines()) == 40


def test_an_event_is_a_line_of_json_with_the_fields_that_it_was_given() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        logs.configure("info", stream=stream)
        logging.getLogger("embedq.gateway").warning("something", extra={"reason": "why", "vector": object()})
        try:
            raise ValueError("x")
        except ValueError:
            logging.getLogger("embedq.gateway").exception("broke")
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        logging.captureWarnings(False)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["level"], first["reason"], first["vector"]) == (
        "something",
        "warning",
        "why",
        "<object>",
    )
    assert "ValueError" in second["exception"]


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


@pytest.mark.parametrize("says_its_length", [True, False])
async def test_requests_hold_so_many_bytes_at_once_and_give_them_back(says_its_length: bool) -> None:
    async with a_gateway(max_body_bytes=400, max_held_bytes=500) as door:
        door.service.behave = lambda received: None
        body = b'{"input": "%s"}' % (b"a" * 350)

        async def pieces() -> AsyncIterator[bytes]:
            yield body[:100]
            yield body[100:]

        async def post() -> httpx.Response:
            return await door.http.post(
                "/v1/embeddings",
                content=body if says_its_length else pieces(),
                headers={"content-type": "application/json", "x-request-timeout": "0.3"},
            )

        first = asyncio.create_task(post())
        await wait_until(
            lambda: door.gateway.entrance.held.held == len(body), what="a request that holds its body"
        )
        refused = await post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await first).status_code == 504
        assert door.gateway.entrance.held.held == 0
        door.service.behave = None
        assert (await post()).status_code == 200
