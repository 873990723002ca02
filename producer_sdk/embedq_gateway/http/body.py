"""A request's body, within bounds."""

from __future__ import annotations

from typing import Final

from embedq_gateway.errors import ApiError
from embedq_gateway.http.exchange import Exchange
from embedq_shared.topics import JSON

_JSON: Final = JSON.encode()


class HungUp(Exception):
    """The client has gone, and waits for no answer."""


async def read_json(exchange: Exchange, most: int) -> bytes:
    """The body of a request that must be JSON.

    A page in a browser may send any other type, or none, to any address without asking that address first.

    Raises:
        ApiError: it says that it is something else.
    """
    media_type = exchange.headers.get(b"content-type", b"")
    if media_type != _JSON and media_type.partition(b";")[0].strip().lower() != _JSON:
        raise ApiError(
            "unsupported_content_type", f"expected the header `content-type: {JSON}`", "content-type"
        )
    if exchange.headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError("unsupported_content_type", "expected a body without compression", "content-encoding")
    return await read_body(exchange, most)


async def read_body(exchange: Exchange, most: int) -> bytes:
    """The whole body, of at most this many bytes.

    Raises:
        ApiError: it is larger, which is known before it is read where the client says its length; or requests hold too much.
        HungUp: the client has gone before its end.
    """
    length = exchange.headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > most:
        raise _too_large(most)
    said = length is not None and length.isdigit()
    if said:
        exchange.hold(int(length or 0))
    message = await exchange.receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")  # one part, as most are: it need not be copied
        if len(body) > most:
            raise _too_large(most)
        if not said:
            exchange.hold(len(body))
        return body
    parts = bytearray()
    while message["type"] == "http.request":
        part = message.get("body", b"")
        if len(parts) + len(part) > most:
            raise _too_large(most)
        if not said:
            exchange.hold(len(part))
        parts += part
        if not message.get("more_body", False):
            return bytes(parts)
        message = await exchange.receive()
    raise HungUp


def _too_large(most: int) -> ApiError:
    """The connection reads the rest and forgets it: a peer that is cut off while it sends would not see this answer."""
    return ApiError("body_too_large", f"expected a body of at most {most:,} bytes")
