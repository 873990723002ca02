"""`/livez`: whether the event loop answers."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import Exchange
from embedq_gateway.http.operation import Operation


class Alive(msgspec.Struct, frozen=True):
    """That a probe was answered."""

    status: Literal["ok"] = "ok"


OPERATIONS: Final = (
    Operation(
        method="get",
        path="/livez",
        tag="Operations",
        summary="Whether the event loop answers.",
        scope=None,
        answer=Alive,
    ),
)


class Health:
    """The handlers of probes. None of them asks who calls."""

    def routes(self) -> list[Route]:
        """The paths."""
        return [route("/livez", self.livez)]

    async def livez(self, exchange: Exchange) -> ASGIApp:
        """That an answer comes at all is the answer."""
        return JsonAnswer.of(Alive())
