"""`/openapi.json` and `/docs`: files of this folder, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.entrance import route
from embedq_gateway.http.exchange import Exchange

FOLDER: Final = Path(__file__).parent
_DOCUMENT: Final = (FOLDER / "openapi.json").read_bytes()
_PAGE: Final = (FOLDER / "page.html").read_bytes()
_ALONE: Final = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"}
"""The page needs nothing but itself."""


class Pages:
    """The handlers. None of them asks who calls: what they say is in the source, too."""

    def routes(self) -> list[Route]:
        """The paths."""
        return [route("/openapi.json", self.document), route("/docs", self.page)]

    async def document(self, exchange: Exchange) -> ASGIApp:
        """The document."""
        return JsonAnswer(_DOCUMENT)

    async def page(self, exchange: Exchange) -> ASGIApp:
        """The page."""
        return HTMLResponse(_PAGE, headers=_ALONE)
