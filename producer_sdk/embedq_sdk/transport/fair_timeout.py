"""`asyncio.timeout`, but nobody else is charged for the event loop's own stalls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def fair_timeout(seconds: float) -> AsyncIterator[None]:
    """Let the block take `seconds` at most.

    A loop that stood still finds an answer and the end of the time due in one turn, and with plain `timeout` the end wins. Here
    an end that comes late is put off once more, by as much as it was late, and by `seconds` at most.

    Raises:
        TimeoutError: as `asyncio.timeout`.
    """
    loop = asyncio.get_running_loop()

    def end() -> None:
        now = loop.time()
        timeout.reschedule(now + put_off(now - timer.when(), seconds))

    async with asyncio.timeout(None) as timeout:
        timer = loop.call_later(seconds, end)
        try:
            yield
        finally:
            timer.cancel()


def put_off(late: float, seconds: float) -> float:
    """How much longer to wait, if the end of `seconds` came `late` seconds late."""
    return min(max(0.0, late), seconds)
