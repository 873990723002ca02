"""The console in a real Chromium, over a gateway with a fake service: what it shows, by roles and names as a screen reader has
them, and that it asks nobody but its gateway.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from embedq_gateway.keys import KeyEntry
from embedq_gateway.keys.key_file import add_key, hash_of
from embedq_shared.messages import ErrorBody
from tests.helpers.browser import a_browser
from tests.helpers.fake_gateway import Door
from tests.helpers.fake_service import rows
from tests.helpers.served_gateway import a_served_gateway
from tests.helpers.support import patient

TEXTS: Final = ["The first text", "A second one", "<img src=x onerror=alert(1)>"]
QUERY: Final = "What is asked?"

CONTRASTS: Final = """
cells => cells.map(cell => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = color => {
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(cell);
  const [a, b] = [luminance(style.color), luminance(style.backgroundColor)].sort();
  return (b + 0.05) / (a + 0.05);
})
"""


class Visit:
    """One page that is open, and what the browser said of it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(patient(20) * 1000)
        page.on("console", lambda message: self._note(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.host = url.split("/")[2]

    def _note(self, text: str) -> None:
        if "Failed to load resource" not in text:  # what a status of 401 or 503 is to the browser
            self.complaints.append(text)


@pytest.fixture(scope="module", autouse=True)
def _patience() -> None:
    expect.set_options(timeout=patient(20) * 1000)


@asynccontextmanager
async def visiting(
    browser: Browser, url: str, scheme: Literal["light", "dark"] = "light"
) -> AsyncIterator[Visit]:
    page = await browser.new_page(color_scheme=scheme, viewport={"width": 1180, "height": 900})
    visit = Visit(page, url)
    try:
        await page.goto(url)
        yield visit
        assert visit.complaints == []
        assert visit.hosts == {visit.host}
    finally:
        await page.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with a_browser() as found:
        yield found


@asynccontextmanager
async def console(**settings: Any) -> AsyncIterator[tuple[Door, str]]:
    async with a_served_gateway(**settings) as (door, url):
        door.gateway.follower.fresh = lambda now: True  # type: ignore[method-assign]
        yield door, url


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_replicas_are_shown_with_their_versions_and_a_reload_step_by_step(browser: Browser) -> None:
    async with console() as (door, url), visiting(browser, url) as visit:
        table = visit.page.get_by_role("region", name="Replicas").get_by_role("table")
        row = table.get_by_role("row", name=re.compile("^r1 "))
        await expect(row).to_contain_text("yes")
        await expect(row).to_contain_text("aaaaaaaaaaaa…")
        await expect(visit.page.get_by_text("1 of 1 replicas serve")).to_be_visible()
        for step in ("load", "warm_up"):
            door.see("r1", version=2, state="LOADING", step=step)
            await expect(row).to_contain_text(step.replace("_", " "))
        await expect(row.get_by_role("list", name="step 3 of 6: warm up")).to_be_visible()
        await expect(visit.page.get_by_text("1 reloading")).to_be_visible()
        door.see("r1", version=2, state="FAILED", step="check", error="the cosine is too low")
        await expect(row).to_contain_text("the cosine is too low")
        door.see("r2", model_version="sha256:" + "b" * 64)
        await expect(visit.page.get_by_text("2 model versions")).to_be_visible()


async def test_the_last_minutes_are_drawn_and_told(browser: Browser) -> None:
    async with console() as (door, url), visiting(browser, url) as visit:
        await expect(visit.page.get_by_text("Nothing to draw yet").first).to_be_visible()
        for at, lag, tokens in ((-30, 5, 0), (-20, 1200, 1000), (-10, 7, 2000)):
            door.gateway.history.add(time.time() + at, {"interactive": lag, "bulk": 0}, tokens)
        lags = visit.page.get_by_role(
            "img", name=re.compile("^Jobs waiting: interactive now 7, at most 1.2K; bulk now 0")
        )
        await expect(lags).to_be_visible()
        await expect(
            visit.page.get_by_role("img", name=re.compile("^Throughput: .* at most 100"))
        ).to_be_visible()


async def test_when_kafka_is_away_the_page_says_so(browser: Browser) -> None:
    async with console() as (door, url), visiting(browser, url) as visit:
        door.gateway.follower.fresh = lambda now: False  # type: ignore[method-assign]
        await expect(
            visit.page.get_by_text("Kafka does not answer: this is what was known last")
        ).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_are_compared_with_the_keyboard_alone(
    browser: Browser, scheme: Literal["light", "dark"]
) -> None:
    async with console() as (_, url), visiting(browser, url, scheme) as visit:
        page = visit.page
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")  # the link that skips to the box
        await page.keyboard.press("Tab")
        await expect(page.get_by_label("Texts, one a line")).to_be_focused()
        await page.keyboard.press("ControlOrMeta+a")
        await page.keyboard.insert_text("\n".join([*TEXTS, "", "  "]))
        await page.keyboard.press("Tab")
        await expect(page.get_by_label("Query", exact=True)).to_be_focused()
        await page.keyboard.press("ControlOrMeta+a")
        await page.keyboard.insert_text(QUERY)
        await page.keyboard.press("Control+Enter")

        vectors = rows([QUERY, *TEXTS])
        cosines = vectors @ vectors.T
        matrix = page.get_by_role("region", name="Similarity of each to each").get_by_role("table")
        for i, text in enumerate([QUERY, *TEXTS]):
            row = matrix.get_by_role("row", name=re.compile(rf"^{i or 'Q'} {re.escape(text)}"))
            await expect(row).to_be_visible()
            cells = [await cell.inner_text() for cell in await row.get_by_role("cell").all()]
            np.testing.assert_allclose([float(cell) for cell in cells], cosines[i], atol=0.0051)
        ranked = [TEXTS[i] for i in np.argsort(-cosines[0, 1:])]
        neighbors = page.get_by_role("list", name="Nearest to the query").get_by_role("listitem")
        found = [(await each.inner_text()).split("\n")[0] for each in await neighbors.all()]
        assert found == ranked
        await expect(page.get_by_text(re.compile(r"3 texts of 64 dimensions in \d+ ms"))).to_be_visible()

        contrasts = await matrix.locator("td:not(.corner)").evaluate_all(CONTRASTS)
        assert min(contrasts) >= 4.5
        if folder := os.environ.get("EMBEDQ_TEST_SCREENSHOTS"):
            await page.screenshot(path=Path(folder) / f"console-{scheme}.png", full_page=True)


async def test_what_is_refused_is_said(browser: Browser) -> None:
    async with console() as (door, url), visiting(browser, url) as visit:
        page = visit.page
        await page.get_by_label("Texts, one a line").fill("")
        await page.get_by_role("button", name="Compare").click()
        await expect(page.get_by_text("Enter a text first.")).to_be_visible()
        await page.get_by_label("Texts, one a line").fill("a\nb")
        door.service.behave = lambda received: [
            door.service.failure(received, ErrorBody.of("text_too_long", "expected at most 512 tokens"))
        ]
        await page.get_by_role("button", name="Compare").click()
        await expect(page.get_by_text(re.compile("expected at most 512 tokens"))).to_be_visible()
        door.service.behave = None
        door.see("r2", alias="other")
        await page.get_by_label("Model", exact=True).select_option("other")
        await page.get_by_role("button", name="Compare").click()
        await expect(page.get_by_text(re.compile("2 texts of 64 dimensions"))).to_be_visible()
        assert {received.job.model for received in door.service.received} == {"default", "other"}


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    add_key(path, KeyEntry(name="search", hash=hash_of("embed-key")))
    add_key(path, KeyEntry(name="ops", hash=hash_of("admin-key"), scopes=("admin", "embed")))
    return str(path)


async def test_a_key_is_asked_for_and_used(browser: Browser, keys_file: str) -> None:
    async with console(keys_file=keys_file) as (_, url), visiting(browser, url) as visit:
        page = visit.page
        await expect(page.get_by_text("An API key is needed: enter one above.")).to_be_visible()
        await page.get_by_label("API key").fill("embed-key")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text("Replicas and plots need a key with the scope admin.")).to_be_visible()
        await page.get_by_role("button", name="Compare").click()
        await expect(page.get_by_text(re.compile("6 texts of 64 dimensions"))).to_be_visible()
        await page.get_by_label("API key").fill("admin-key")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text("1 of 1 replicas serve")).to_be_visible()
        await page.reload()
        await expect(page.get_by_text("1 of 1 replicas serve")).to_be_visible()


async def test_everything_that_can_be_used_has_a_name_and_a_narrow_window_shows_all(browser: Browser) -> None:
    async with console() as (_, url), visiting(browser, url) as visit:
        page = visit.page
        await page.set_viewport_size({"width": 360, "height": 740})
        await page.get_by_role("button", name="Compare").click()
        await expect(page.get_by_role("heading", name="Nearest to the query")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        unnamed = await page.evaluate(
            """[...document.querySelectorAll("input, textarea, select, button, [tabindex='0']")]
               .filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-labelledby")))
               .map(e => e.outerHTML)"""
        )
        assert unnamed == []
