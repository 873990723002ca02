"""A gateway over a fake service for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.helpers.fake_gateway import Door, a_gateway


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with a_gateway() as door:
        yield door
