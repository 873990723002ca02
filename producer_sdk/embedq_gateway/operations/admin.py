"""What operators ask over HTTP: how the service stands, and a reload that is watched. For keys with scope `admin`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.errors import ApiError, ErrorAnswer, api_error
from embedq_gateway.fleet.fleet import Fleet, Model
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.body import read_json
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import Exchange
from embedq_gateway.http.operation import Operation
from embedq_gateway.operations.history import History, Point
from embedq_gateway.operations.sse import EventStream, events
from embedq_sdk.admin import LostRace, RolloutUpdate, UnexpectedVersion
from embedq_sdk.admin.commands import DEFAULT_WAVE
from embedq_sdk.admin.rollout import ReplicaView
from embedq_shared.messages import DEFAULT_ALIAS, MAX_SOAK_S, Policy, Quantization
from embedq_shared.topics import Lane

log = logging.getLogger("embedq.gateway")

_MOST_BODY_BYTES: Final = 64 * 1024
"""Of a reload's command."""
_MOST_STREAMS: Final = 16
"""Reloads that are watched at once; each has Kafka clients of its own."""


class ReloadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /admin/reload`: what `embedq reload` takes."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """A model directory below the service's model root."""
    alias: Annotated[str, Meta(min_length=1, max_length=256)] = DEFAULT_ALIAS
    digest: str | None = None
    policy: Literal["auto", "availability", "resource"] = "auto"
    quantization: Quantization | None = None
    min_cosine: Annotated[float, Meta(ge=-1, le=1)] | None = None
    golden: str | None = None
    """A file of texts and expected vectors, below the service's model root."""
    golden_min_cosine: Annotated[float, Meta(ge=-1, le=1)] | None = None
    min_dimensions: Annotated[int, Meta(ge=1)] | None = None
    pool: str | None = None
    """Where the alias shall live, `default` for the pool without a name; null: where it lives now."""
    expected_version: Annotated[int, Meta(ge=0)] | None = None
    """The command that must be in force, 0 for none."""
    max_unavailable: int | str | None = DEFAULT_WAVE
    """Replicas that change at once: a number, a percentage such as "25%", or null for all."""
    canary: bool = True
    """One replica changes alone first."""
    soak: Annotated[float, Meta(ge=0, le=MAX_SOAK_S)] = 0.0
    """Seconds that the canary must serve before others follow."""
    timeout: Annotated[float, Meta(gt=0, le=3600)] = 600.0

    @property
    def command_policy(self) -> Policy | None:
        """As a command has it."""
        match self.policy:
            case "availability":
                return "availability_preserving"
            case "resource":
                return "resource_preserving"
            case _:
                return None


class KeyFileState(msgspec.Struct, frozen=True, kw_only=True):
    """The keys in force. `fault`: why the file as it is now is not."""

    names: list[str]
    fault: str | None


class AdminStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /admin/status`."""

    at: float
    """Epoch seconds."""
    fresh: bool
    """Whether the replicas are as they are now; false while Kafka does not answer."""
    replicas: list[ReplicaView]
    models: list[Model]
    lag: dict[Lane, int] | None
    """Jobs that wait or are in flight, by lane; null: Kafka does not say."""
    history: list[Point]
    """Of the last ten minutes, oldest first."""
    keys: KeyFileState | None
    """null: there are none."""


OPERATIONS: Final = (
    Operation(
        method="get",
        path="/admin/status",
        tag="Operations",
        summary="The live replicas, the lag, the last ten minutes, and the keys in force.",
        scope="admin",
        answer=AdminStatus,
    ),
    Operation(
        method="post",
        path="/admin/reload",
        tag="Operations",
        summary="Makes every replica load another model, and tells how they follow: an event `update` for each change, then `done`; "
        "`error` if it cannot be followed, `leaving` if the gateway must end before it.",
        scope="admin",
        body=ReloadRequest,
        answer_media="text/event-stream",
        codes=(
            "malformed",
            "invalid_value",
            "unsupported_content_type",
            "body_too_large",
            "superseded",
            "overloaded",
            "unavailable",
        ),
    ),
)

Reload = Callable[[ReloadRequest], AsyncGenerator[RolloutUpdate, None]]
"""Writes the command, then yields how the replicas follow it."""


# More than six parameters: keyword-only parts of the gateway that it shows.
class Admin:
    """The routes below `/admin`."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        fresh: Callable[[], bool],
        history: History,
        keys: Callable[[], KeyFileState | None],
        reload: Reload,
        leaving: asyncio.Event,
    ) -> None:
        self._fleet = fleet
        self._fresh = fresh
        self._history = history
        self._keys = keys
        self._reload = reload
        self._leaving = leaving
        self._streams = 0

    def routes(self) -> list[Route]:
        """For the application."""
        return [
            route("/admin/status", self.status),
            route("/admin/reload", self.reload, methods=("POST",)),
        ]

    async def status(self, exchange: Exchange) -> ASGIApp:
        """How the service stands."""
        exchange.require("admin")
        now = time.time()
        points = self._history.points()
        found = AdminStatus(
            at=now,
            fresh=self._fresh(),
            replicas=self._fleet.replicas(now),
            models=self._fleet.models(now),
            lag=points[-1].lag if points else None,
            history=points,
            keys=self._keys(),
        )
        return JsonAnswer.of(found, headers=[(b"cache-control", b"no-store")])

    async def reload(self, exchange: Exchange) -> ASGIApp:
        """Write a reload command, then stream how the replicas follow it: an event "update" for each change, the last one "done"."""
        caller = exchange.require("admin")
        asked = _asked(await read_json(exchange, _MOST_BODY_BYTES))
        if self._streams >= _MOST_STREAMS:
            raise ApiError(
                "overloaded", f"{_MOST_STREAMS} reloads are being watched here; see `/admin/status`"
            )
        log.info("reload_asked", extra={"caller": caller.name, "alias": asked.alias, "path": asked.path})
        updates = self._watched(asked)
        first = await anext(updates)  # what is wrong with the command is told by the status
        return EventStream(
            exchange,
            events(_joined(first, updates), name=_name, failed=_failed, leaving=self._leaving),
        )

    async def _watched(self, asked: ReloadRequest) -> AsyncGenerator[RolloutUpdate, None]:
        self._streams += 1
        try:
            async for update in self._reload(asked):
                yield update
        except (LostRace, UnexpectedVersion) as error:
            raise ApiError("superseded", str(error)) from None
        finally:
            self._streams -= 1


async def _joined(
    first: RolloutUpdate, rest: AsyncGenerator[RolloutUpdate, None]
) -> AsyncGenerator[RolloutUpdate, None]:
    try:
        yield first
        async for update in rest:
            yield update
    finally:
        await rest.aclose()


def _name(update: RolloutUpdate) -> str:
    return "done" if update.done else "update"


def _failed(error: Exception) -> ErrorAnswer:
    log.warning("reload_not_followed", extra={"reason": str(error)})
    return api_error(error).answer()


def _asked(body: bytes) -> ReloadRequest:
    try:
        return msgspec.json.decode(body, type=ReloadRequest)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_value", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("malformed", "expected a JSON object") from None
