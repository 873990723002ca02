"""The gateway's OpenAPI document: fresh, complete, and what is served."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openapi_spec_validator
import pytest

from embedq_gateway.errors import KINDS
from embedq_gateway.openapi.pages import FOLDER
from tests.helpers.fake_gateway import a_gateway
from tools import openapi

DOCUMENT = json.loads((FOLDER / "openapi.json").read_text(encoding="utf-8"))
NOT_DOCUMENTED = {"/", "/console/console.css", "/console/console.js", "/console/icon.svg"}
"""Paths that are no interface: the files of a page."""


def test_document_and_page_are_fresh() -> None:
    assert openapi.stale() == [], "run `make contract`"


def test_what_is_stale_is_named(tmp_path: Path) -> None:
    for name, text in openapi.render().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert openapi.stale(tmp_path) == []
    (tmp_path / "page.html").write_text("old", encoding="utf-8")
    assert openapi.stale(tmp_path) == ["page.html"]


async def test_every_path_of_the_gateway_is_documented_and_no_other() -> None:
    async with a_gateway(opened=False) as door:
        routes = {
            (re.sub(r":\w+}", "}", route.path), method.lower())  # type: ignore[attr-defined]
            for route in door.gateway.routes()
            for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
        }
    said = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert {each for each in routes if each[0] not in NOT_DOCUMENTED} == said


def test_the_document_is_what_openapi_says() -> None:
    openapi_spec_validator.validate(DOCUMENT)


async def test_document_and_page_are_served() -> None:
    async with a_gateway() as door:
        assert (await door.http.get("/openapi.json")).json() == DOCUMENT
        page = await door.http.get("/docs")
        assert page.text == (FOLDER / "page.html").read_text(encoding="utf-8")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_the_page_needs_no_other_address_and_no_script() -> None:
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", page)
    for path in DOCUMENT["paths"]:
        assert f"<code>{path}</code>" in page


@pytest.mark.parametrize(
    ("path", "method"),
    [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods],
)
def test_every_reference_leads_somewhere_and_every_error_has_its_shape(path: str, method: str) -> None:
    one = DOCUMENT["paths"][path][method]
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(one)):
        assert name in DOCUMENT["components"]["schemas"]
    known = {str(kind.status) for kind in KINDS.values()}
    assert one["responses"].keys() - {"200"} <= known
    assert "500" in one["responses"]
