"""Server-sent events: news over one HTTP answer, as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from embedq_gateway.errors import ApiError
from embedq_gateway.http.exchange import Exchange
from embedq_gateway.http.hang_up import UntilHungUp
from embedq_sdk.errors import EmbedError

T = TypeVar("T")

_HEADERS: Final = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back until it has some kilobytes
]
_SIGN_OF_LIFE_S: Final = 10.0
"""Silence for which proxies do not yet take a connection for dead."""


class EventStream:
    """An answer of events, as an ASGI application; it ends when they do, or when the client has gone."""

    def __init__(self, exchange: Exchange, chunks: AsyncGenerator[bytes, None]) -> None:
        self._exchange = exchange
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send each as it comes.

        Raises:
            HungUp: the client has gone.
        """
        async with contextlib.aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            with UntilHungUp(self._exchange):
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def event(name: str, data: object) -> bytes:
    """One event. JSON has line ends between its parts nowhere, and inside of strings only escaped ones."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


async def events(
    news: AsyncGenerator[T, None],
    *,
    name: Callable[[T], str],
    failed: Callable[[ApiError | EmbedError], object],
    leaving: asyncio.Event,
    sign_of_life_s: float = _SIGN_OF_LIFE_S,
) -> AsyncGenerator[bytes, None]:
    """Each item as an event, and a comment where there was none for long. Ends with an event "error" if the source fails, and with
    one "leaving" if this process must end before it.
    """
    left = asyncio.ensure_future(leaving.wait())
    pending = asyncio.ensure_future(anext(news))
    try:
        while True:
            done, _ = await asyncio.wait(
                {pending, left}, timeout=sign_of_life_s, return_when=asyncio.FIRST_COMPLETED
            )
            if pending in done:
                try:
                    item = pending.result()
                except StopAsyncIteration:
                    return
                except (
                    ApiError,
                    EmbedError,
                ) as error:  # the answer has begun: its end is the place to say so
                    yield event("error", failed(error))
                    return
                yield event(name(item), item)
                pending = asyncio.ensure_future(anext(news))
            elif left in done:
                yield event("leaving", {})
                return
            else:
                yield b": no news\n\n"
    finally:
        left.cancel()
        pending.cancel()
        await asyncio.gather(left, pending, return_exceptions=True)
        await news.aclose()
