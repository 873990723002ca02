"""Small helpers for tests. Nothing here knows what is under test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def wait_until(
    ready: Callable[[], bool | Awaitable[bool]], *, within: float = 30.0, what: str = "the condition"
) -> None:
    """Wait for a condition instead of a duration; `what` names it when it never comes."""
    try:
        async with asyncio.timeout(within):
            while True:
                answer = ready()
                if await answer if isinstance(answer, Awaitable) else answer:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true within {within:g} s") from None
