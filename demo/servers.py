"""The replica and the gateway as child processes that cannot outlive the demo."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from embedq_sdk.dev.ports import HOST, free_ports
from embedq_sdk.dev.processes import Processes

_START_LIMIT_S: Final = 300.0
"""For one that hangs; one that ends is noticed at once."""
_STOP_LIMIT_S: Final = 30.0


class ServerFailed(Exception):
    """A server did not start, or did not end, as it should; the message ends with its last log lines."""


class Server:
    """`python -m MODULE`, with its log in the guarded temporary directory. It says by `/readyz` whether it serves."""

    def __init__(self, processes: Processes, name: str, module: str) -> None:
        self._processes = processes
        self._name = name
        self._module = module
        (self.port,) = free_ports(1)
        self.url = f"http://{HOST}:{self.port}"

    def start(self, settings: Mapping[str, str]) -> None:
        """Start it; `ready` returns once it serves."""
        # Compiling torch's and transformers' sources takes five seconds; their bytecode is worth keeping.
        environ = {"PYTHONDONTWRITEBYTECODE": "", **settings}
        self._processes.start(self._name, [sys.executable, "-m", self._module], environ)

    async def ready(self) -> None:
        """Return once /readyz says yes.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while not await asyncio.to_thread(self._asked):
            if (code := self._processes.exit_code(self._name)) is not None:
                raise ServerFailed(f"the {self._name} ended with exit code {code}:\n{self._log()}")
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"the {self._name} was not ready within {_START_LIMIT_S:g} s:\n{self._log()}"
                )
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """SIGTERM, and wait until it has finished what it accepted.

        Raises:
            ServerFailed: its exit code was not 0.
        """
        await asyncio.to_thread(self._processes.stop, self._name, grace_s=_STOP_LIMIT_S)
        code = self._processes.exit_code(self._name)
        if code != 0:
            raise ServerFailed(f"the {self._name} ended with exit code {code} after SIGTERM:\n{self._log()}")

    def _asked(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log(self) -> str:
        return self._processes.log_tail(self._name)


def start_replica(processes: Processes, *, servers: str, redis_url: str, prefix: str, model: Path) -> Server:
    """One replica of the service."""
    replica = Server(processes, "service", "embedq_consumer")
    replica.start(
        {
            "EMBEDQ_KAFKA_SERVERS": servers,
            "EMBEDQ_REDIS_URL": redis_url,
            "EMBEDQ_TOPIC_PREFIX": prefix,
            "EMBEDQ_GROUP": prefix,
            "EMBEDQ_MODEL": str(model),
            "EMBEDQ_MODEL_ROOT": str(model.parent),
            "EMBEDQ_HTTP_HOST": HOST,
            "EMBEDQ_HTTP_PORT": str(replica.port),
        }
    )
    return replica


def start_gateway(processes: Processes, *, servers: str, prefix: str) -> Server:
    """One gateway, which is ready once a replica is."""
    gateway = Server(processes, "gateway", "embedq_gateway")
    gateway.start(
        {
            "EMBEDQ_KAFKA_SERVERS": servers,
            "EMBEDQ_TOPIC_PREFIX": prefix,
            "EMBEDQ_GATEWAY_GROUP": prefix,
            "EMBEDQ_GATEWAY_HOST": HOST,
            "EMBEDQ_GATEWAY_PORT": str(gateway.port),
            "EMBEDQ_GATEWAY_DRAIN_DELAY_S": "0",
        }
    )
    return gateway
