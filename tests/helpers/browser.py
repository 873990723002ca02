"""A real Chromium: Debian's, or whichever the machine has. Where there is none, its tests are skipped and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from playwright.async_api import Browser, async_playwright

from tests.helpers.support import patient

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def chromium() -> str:
    """Its program."""
    found = os.environ.get("EMBEDQ_TEST_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(_NAMES)} is installed (Debian's package: chromium)")
    return found


@asynccontextmanager
async def a_browser(**options: Any) -> AsyncIterator[Browser]:
    """A browser without a window, which reaches nothing but this machine."""
    program = chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program,
            timeout=patient(60) * 1000,
            args=[
                "--no-sandbox",  # root, as in most CI, may not have one
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
            **options,
        )
        try:
            yield browser
        finally:
            await browser.close()
