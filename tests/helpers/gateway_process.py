"""The real gateway as a process, in front of a real Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from embedq_sdk.dev import DevStack
from embedq_shared.topics import Topics
from tests.helpers import warm_start
from tests.helpers.support import patient, wait_until
from tests.helpers.warm_start import WarmProcess


class GatewayProcess:
    """One `embedq gateway` on a free port. Its log is JSON lines, as the service's."""

    def __init__(self, stack: DevStack, topics: Topics, log: Path, **settings: Any) -> None:
        self.log = log
        self._environ = {
            name: value for name, value in os.environ.items() if not name.startswith("EMBEDQ_")
        } | {
            "EMBEDQ_KAFKA_SERVERS": stack.kafka_servers,
            "EMBEDQ_TOPIC_PREFIX": topics.prefix,
            "EMBEDQ_GATEWAY_PORT": "0",
            "EMBEDQ_GATEWAY_DRAIN_DELAY_S": "0.2",
            "EMBEDQ_GATEWAY_TIMEOUT_S": f"{patient(60.0):.0f}",
            "EMBEDQ_GATEWAY_MAX_TIMEOUT_S": "86400",
            **{f"EMBEDQ_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.process: asyncio.subprocess.Process | WarmProcess | None = None

    async def start(self, *, connected: bool = True) -> GatewayProcess:
        """Start it, and wait until it listens; `connected`: until each of its workers has reached Kafka and one has seen a replica."""
        before = len(self.events())
        with await asyncio.to_thread(self.log.open, "ab", buffering=0) as log:
            self.process = await asyncio.to_thread(
                warm_start.start, "command", ["embedq_gateway"], self._environ, out=log
            ) or await asyncio.create_subprocess_exec(
                sys.executable, "-m", "embedq_gateway", env=self._environ, stdout=log, stderr=log
            )
        await wait_until(self._is(connected, before), within=60.0, what="a gateway that answers")
        return self

    def _is(self, connected: bool, before: int) -> Any:
        async def answers() -> bool:
            if self.process is not None and self.process.returncode is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}:\n{self.tail()}")
            if self.url is None:
                return False
            async with self.http() as http:
                try:
                    if not connected:
                        return (await http.get("/livez")).status_code == 200
                    if not (await http.get("/v1/models")).json()["data"] or not self.all_connected(before):
                        return False
                    probe = await http.post("/v1/embeddings", json={"input": "is it there?"})
                    return probe.status_code == 200
                except (httpx.TransportError, KeyError):
                    return False

        return answers

    def all_connected(self, before: int = 0) -> bool:
        """Whether each worker has said so, after so many events: the connection of a request chooses which of them answers."""
        said = self.events()[before:]
        workers = int(next(event["workers"] for event in said if event["event"] == "listening"))
        return len([event for event in said if event["event"] == "kafka_connected"]) >= workers

    @property
    def url(self) -> str | None:
        """Where it listens; None before it does."""
        said = [event for event in self.events() if event["event"] == "listening"]
        return str(said[-1]["url"]) if said else None

    def http(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client of its own. It speaks no TLS, for which it would read all certificates: 40 ms of a processor each time."""
        assert self.url is not None
        return httpx.AsyncClient(base_url=self.url, timeout=patient(60.0), verify=False, **options)

    def events(self) -> list[dict[str, Any]]:
        """Its log."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, within: float = 60.0) -> int:
        """The exit code."""
        assert self.process is not None
        async with asyncio.timeout(patient(within)):
            return await self.process.wait()

    async def stop(self, within: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.kill(signal.SIGTERM)
        return await self.ended(within)


@asynccontextmanager
async def running(gateway: GatewayProcess, *, connected: bool = True) -> AsyncIterator[GatewayProcess]:
    """Started, and gone at the end whatever happens."""
    try:
        yield await gateway.start(connected=connected)
        await gateway.stop()  # orderly, so that coverage is written down
    finally:
        if gateway.process is not None and gateway.process.returncode is None:
            gateway.kill()
            await gateway.ended()
