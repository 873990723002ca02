"""Work that ends when its client hangs up."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from embedq_gateway.http.body import HungUp
from embedq_gateway.http.exchange import Exchange

WATCH_AFTER_S: Final = 0.2
"""Most answers are there before; watching costs a task for each request. A job that has not waited for so long is in Kafka, and
nothing is gained by knowing earlier."""


class UntilHungUp:
    """The work inside is cancelled when the client has gone, and `HungUp` is raised then.

    The body must have been read: what comes after it can only be the end.
    """

    __slots__ = ("_exchange", "_gone", "_task", "_timer", "_watcher")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._gone = False
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and self._task is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise HungUp from None

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        if self._task is not None:
            self._gone = True
            self._task.cancel()
