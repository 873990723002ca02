"""The pages that probes and scrapes ask for: `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Literal

import msgspec
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import Exchange
from embedq_gateway.http.operation import Operation
from embedq_gateway.operations.metrics import GatewayMetrics


class Alive(msgspec.Struct, frozen=True):
    """That a probe was answered."""

    status: Literal["ok"] = "ok"


class NotReady(msgspec.Struct, frozen=True):
    """Why no request should be sent here."""

    reason: str
    status: Literal["not ready"] = "not ready"


OPERATIONS: Final = (
    Operation(
        method="get",
        path="/livez",
        tag="Operations",
        summary="Whether the event loop answers.",
        scope=None,
        answer=Alive,
    ),
    Operation(
        method="get",
        path="/readyz",
        tag="Operations",
        summary="Whether requests should be sent here: Kafka answers, and a live replica serves the default model.",
        scope=None,
        answer=Alive,
        error=NotReady,
        codes=("unavailable",),
    ),
    Operation(
        method="get",
        path="/metrics",
        tag="Operations",
        summary="Prometheus' text, of all workers.",
        scope="metrics",
        answer_media="text/plain",
    ),
)


def not_ready(*, leaving: bool, answering: bool, fresh: bool, alias: str, serving: int) -> str | None:
    """Why no request should be sent here; None: there is no reason."""
    if leaving:
        return "leaving"
    if not (answering and fresh):
        return "Kafka does not answer"
    if not serving:
        return f"no live replica serves `{alias}`"
    return None


class Health:
    """The handlers of probes, which ask nobody for a key, and of scrapes, which need the scope `metrics` or `admin`."""

    def __init__(self, not_ready: Callable[[], str | None], metrics: GatewayMetrics) -> None:
        self._not_ready = not_ready
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            route("/livez", self.livez),
            route("/readyz", self.readyz),
            route("/metrics", self.metrics),
        ]

    async def livez(self, exchange: Exchange) -> ASGIApp:
        """That an answer comes at all is the answer."""
        return JsonAnswer.of(Alive())

    async def readyz(self, exchange: Exchange) -> ASGIApp:
        """Whether requests should be sent here, and if not, why."""
        reason = self._not_ready()
        if reason is None:
            return JsonAnswer.of(Alive())
        return JsonAnswer.of(NotReady(reason), status=503, headers=[(b"retry-after", b"1")])

    async def metrics(self, exchange: Exchange) -> ASGIApp:
        """What Prometheus reads, of all workers."""
        exchange.require("metrics")
        accept = exchange.headers.get(b"accept", b"").decode("latin-1")
        content_type, body = await asyncio.to_thread(self._metrics.page, accept)
        return _Page(content_type.encode(), body)


class _Page:
    def __init__(self, content_type: bytes, body: bytes) -> None:
        self._content_type = content_type
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", self._content_type), (b"content-length", b"%d" % len(self._body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else self._body
        await send({"type": "http.response.body", "body": body})
