"""The console: a page and its parts, all of this package, under a policy that lets it load and ask nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import Exchange

_FOLDER: Final = Path(__file__).parent / "static"
_FILES: Final = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/console/console.css": ("console.css", b"text/css; charset=utf-8"),
    "/console/console.js": ("console.js", b"text/javascript; charset=utf-8"),
    "/console/icon.svg": ("icon.svg", b"image/svg+xml"),
}
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]


class Page:
    """One file, as an ASGI application: the same bytes for everybody, so it asks for no key."""

    def __init__(self, body: bytes, content_type: bytes) -> None:
        self._body = body
        self._tag = b'"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()
        self._headers = [*_HEADERS, (b"etag", self._tag), (b"content-type", content_type)]

    async def answer(self, exchange: Exchange) -> ASGIApp:
        """Whoever asks."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, unless the browser has it."""
        known = (b"if-none-match", self._tag) in scope["headers"]
        length = [] if known else [(b"content-length", b"%d" % len(self._body))]
        await send(
            {
                "type": "http.response.start",
                "status": 304 if known else 200,
                "headers": [*self._headers, *length],
            }
        )
        body = b"" if known or scope["method"] == "HEAD" else self._body
        await send({"type": "http.response.body", "body": body})


_PAGES: Final = {
    path: Page((_FOLDER / name).read_bytes(), content_type) for path, (name, content_type) in _FILES.items()
}
"""Read once."""


def console_routes() -> list[Route]:
    """The page and its parts."""
    return [route(path, page.answer) for path, page in _PAGES.items()]
