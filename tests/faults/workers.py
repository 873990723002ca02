"""The workers of a run: real processes, started again when they end, and what can be done to them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import structlog

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.faults.history import HistoryWriter, Worker
from tests.faults.points import Order, give
from tests.faults.worker import ORDERS
from tests.helpers.service_process import Replica
from tests.helpers.support import patient, wait_until

log = structlog.get_logger()

_PATH: Final = os.pathsep.join(
    [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
"""Where workers find the tests' own modules, and whatever this process was told."""
_RESTART_S: Final = 0.5
"""What a supervisor takes at least; a worker that cannot start must not start a hundred times a minute."""


class SupervisedWorker:
    """One worker, started again half a second after it ended, as any supervisor does, until `close`."""

    # More than six parameters: what a worker is, and where its life is written down.
    def __init__(
        self,
        name: str,
        stack: DevStack,
        topics: Topics,
        model: Path,
        directory: Path,
        *,
        history: HistoryWriter,
        clock: Callable[[], float],
        settings: dict[str, Any],
    ) -> None:
        self.name = name
        self._orders = directory / f"{name}.orders"
        self._replica = Replica(
            stack,
            topics,
            model,
            directory / f"{name}.log",
            python=[
                "-u",
                "-m",
                "tests.faults.worker",
            ],  # not from a warm process: it starts as any service does
            replica=name,
            **settings,
        ).in_environment({ORDERS: str(self._orders), "PYTHONPATH": _PATH})
        self._history = history
        self._clock = clock
        self._held_until: float = 0.0
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._closing = False
        self.ends: list[int] = []
        """Exit codes so far."""

    @property
    def replica(self) -> Replica:
        """Its process, log and pages."""
        return self._replica

    @property
    def running(self) -> bool:
        """Whether there is a process now."""
        return self._replica.process is not None and self._replica.returncode is None

    async def run(self) -> None:
        """Start it again and again, until `close`."""
        while not self._closing:
            await self._may_start.wait()
            await self._replica.start(ready=False)
            self._history.add(Worker(at=self._clock(), name=self.name, event="started"))
            assert self._replica.process is not None
            code = await self._replica.process.wait()
            self.ends.append(code)
            self._history.add(Worker(at=self._clock(), name=self.name, event="ended", code=code))
            if not self._closing:
                await asyncio.sleep(_RESTART_S)

    async def ready(self, within: float = 120.0) -> None:
        """Wait until it takes jobs."""

        async def is_ready() -> bool:
            return self.running and await self._replica.get("/readyz") == 200

        await wait_until(is_ready, within=within, what=f"{self.name} ready")

    async def end(
        self, number: Literal[signal.Signals.SIGKILL, signal.Signals.SIGTERM], away_s: float
    ) -> None:
        """Send the signal, and leave it away for some seconds."""
        self._may_start.clear()
        try:
            self.send(number)
            await asyncio.sleep(away_s)
        finally:
            self._may_start.set()

    async def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after some seconds."""
        self.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.send(signal.SIGCONT)

    def order(self, point: str, passes: int, number: Literal["SIGKILL", "SIGSTOP"]) -> bool:
        """Have it end or stop itself at a point of a job's path. False if it is not far enough to listen."""
        return self.running and give(Order(point, passes, number), self._orders, self._replica.pid)

    async def stands_still(self, within_s: float) -> bool:
        """Wait until it has stopped itself."""
        deadline = asyncio.get_running_loop().time() + within_s
        while asyncio.get_running_loop().time() < deadline:
            with suppress(psutil.NoSuchProcess):
                if self.running and psutil.Process(self._replica.pid).status() == psutil.STATUS_STOPPED:
                    return True
            await asyncio.sleep(0.02)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self._replica.pid, number)

    async def close(self, within: float = 90.0) -> None:
        """SIGTERM, and no new start; SIGKILL if it does not end."""
        self._closing = True
        self._may_start.set()
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        if self.running:
            try:
                await self._replica.ended(within)
            except TimeoutError:
                log.warning("worker_does_not_end", worker=self.name)
                self.send(signal.SIGKILL)
                await self._replica.ended(patient(10))
