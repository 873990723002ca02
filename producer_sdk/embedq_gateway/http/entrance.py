"""Where every request comes in and its answer goes out: errors become answers, and each request is seen once, at its end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from embedq_gateway.errors import ApiError, api_error
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.body import HungUp
from embedq_gateway.http.exchange import Exchange, HeldBytes
from embedq_gateway.keys import Door
from embedq_sdk.errors import EmbedError, KafkaUnavailable, TopicMissing, UnreadableReply
from embedq_shared.codec import BadJob

log = logging.getLogger("embedq.gateway")

HUNG_UP: Final = 499
"""What is logged and counted where the client has gone before its answer; nginx made the number usual."""

Handler = Callable[[Exchange], Awaitable[ASGIApp]]
"""What answers the requests of a path: the answer is an ASGI application. Raises what `api_error` knows."""
ErrorWriter = Callable[[ApiError], ASGIApp]
"""How a path writes an error."""
Observer = Callable[[Exchange], None]
"""Called once for each request, when its answer is sent or nobody waits for it. Never raises."""

_KEY: Final = "embedq.exchange"


def openai_error(error: ApiError) -> ASGIApp:
    """An error in OpenAI's shape."""
    return JsonAnswer.of(error.answer(), status=error.status, headers=error.answer_headers())


class Endpoint:
    """A handler as an ASGI application, and how its errors are written."""

    def __init__(self, path: str, handler: Handler, errors: ErrorWriter = openai_error) -> None:
        self._path = path
        self._handler = handler
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange: Exchange = scope[_KEY]
        exchange.route = self._path
        try:
            answer = await self._handler(exchange)
        except (ApiError, EmbedError, BadJob) as error:
            answer = refusal(exchange, error, self._errors)
        await answer(scope, exchange.receive, exchange.send)


def route(
    path: str, handler: Handler, *, methods: Sequence[str] = ("GET",), errors: ErrorWriter = openai_error
) -> Route:
    """A path and what answers it, for `Entrance`."""
    return Route(path, Endpoint(path, handler, errors), methods=list(methods))


def refusal(exchange: Exchange, error: Exception, write: ErrorWriter = openai_error) -> ASGIApp:
    """The answer for an error. What the caller is not told goes to the log, under the request's id."""
    told = api_error(error)
    exchange.error = told.code
    if isinstance(error, (KafkaUnavailable, TopicMissing, UnreadableReply)) or told.status == 500:
        log.warning(
            "request_failed", extra={"request_id": exchange.request_id.decode(), "reason": str(error)}
        )
    return write(told)


class Entrance:
    """The ASGI application: routes, and what surrounds each request.

    Invariants:
        - Each request that comes in is answered, or its client has gone; an error after the answer began ends the connection.
        - Each request is shown to every observer once, at its end.
    """

    def __init__(
        self, routes: Sequence[BaseRoute], keys: Door, lifespan: Lifespan[Router], *, most_held_bytes: int
    ) -> None:
        self._router = Router(list(routes), redirect_slashes=False, lifespan=lifespan)
        self._fixed = dict(_fixed(routes))
        self._keys = keys
        self.held = HeldBytes(most_held_bytes)
        """Bytes of the bodies of requests that are being answered."""
        self.observers: list[Observer] = []
        self.in_flight: set[Exchange] = set()
        """Requests that are being answered now."""
        self.closing = False
        """Whether answers end their connections, since the gateway is leaving."""
        self.fault: BaseException | None = None
        """Why this process ends by itself, if it does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's next request, or the process's beginning and end."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._keys, self.held, closing=self.closing)
        scope[_KEY] = exchange
        scope["app"] = self
        self.in_flight.add(exchange)
        try:
            await self._answer(exchange)
        finally:
            self.in_flight.discard(exchange)
            exchange.ended()
            for observe in self.observers:
                observe(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        scope = exchange.scope
        # A path without variable parts needs no search among all.
        app = self._fixed.get((scope["method"], scope["path"]), self._router)
        try:
            await app(scope, exchange.receive, exchange.send)
        except HungUp:
            exchange.status = HUNG_UP
        except HTTPException as error:
            await refusal(exchange, self._no_route(error, scope["path"]))(
                scope, exchange.receive, exchange.send
            )
        except Exception as error:
            log.exception("request_broke", extra={"request_id": exchange.request_id.decode()})
            if exchange.status:  # the answer has begun, and cannot be taken back
                raise
            await refusal(exchange, error)(scope, exchange.receive, exchange.send)

    def _no_route(self, error: HTTPException, path: str) -> ApiError:
        """What the router says where no route fits. It names the methods of one route; a path may have several."""
        if error.status_code != 405:
            return ApiError("not_found", "there is nothing at this path")
        fit = [one for one in self._router.routes if isinstance(one, Route) and one.path_regex.match(path)]
        allowed = ", ".join(sorted({method for one in fit for method in one.methods or ()}))
        return ApiError(
            "method_not_allowed", f"this path takes {allowed}", headers=((b"allow", allowed.encode()),)
        )


def _fixed(routes: Iterable[BaseRoute]) -> Iterator[tuple[tuple[str, str], ASGIApp]]:
    """What answers the paths that have no variable parts, by method and path."""
    for one in routes:
        if isinstance(one, Route) and "{" not in one.path:
            yield from (((method, one.path), one.app) for method in one.methods or ())
