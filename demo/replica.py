"""One replica of the service as a child process that cannot outlive the demo."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from embedq_sdk.dev.ports import free_ports
from embedq_sdk.dev.processes import Processes

_NAME: Final = "consumer"
_START_LIMIT_S: Final = 300.0
"""For one that hangs; one that ends is noticed at once."""
_STOP_LIMIT_S: Final = 30.0


class ReplicaFailed(Exception):
    """The service did not start, or did not end, as it should; the message ends with its last log lines."""


class Replica:
    """`python -m embedq_consumer`, with its log in the guarded temporary directory."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        (self._port,) = free_ports(1)

    def start(self, *, servers: str, redis_url: str, prefix: str, model: Path) -> None:
        """Start it; `ready` returns once it serves."""
        settings = {
            "EMBEDQ_KAFKA_SERVERS": servers,
            "EMBEDQ_REDIS_URL": redis_url,
            "EMBEDQ_TOPIC_PREFIX": prefix,
            "EMBEDQ_GROUP": prefix,
            "EMBEDQ_MODEL": str(model),
            "EMBEDQ_MODEL_ROOT": str(model.parent),
            "EMBEDQ_HTTP_HOST": "127.0.0.1",
            "EMBEDQ_HTTP_PORT": str(self._port),
        }
        # Compiling torch's and transformers' sources takes five seconds; their bytecode is worth keeping.
        settings["PYTHONDONTWRITEBYTECODE"] = ""
        self._processes.start(_NAME, [sys.executable, "-m", "embedq_consumer"], settings)

    async def ready(self) -> None:
        """Return once /readyz says yes.

        Raises:
            ReplicaFailed: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while not await asyncio.to_thread(self._asked):
            if (code := self._processes.exit_code(_NAME)) is not None:
                raise ReplicaFailed(f"the service ended with exit code {code}:\n{self._log()}")
            if time.monotonic() > deadline:
                raise ReplicaFailed(f"the service was not ready within {_START_LIMIT_S:g} s:\n{self._log()}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """SIGTERM, and wait until it has drained.

        Raises:
            ReplicaFailed: its exit code was not 0.
        """
        await asyncio.to_thread(self._processes.stop, _NAME, grace_s=_STOP_LIMIT_S)
        code = self._processes.exit_code(_NAME)
        if code != 0:
            raise ReplicaFailed(f"the service ended with exit code {code} after SIGTERM:\n{self._log()}")

    def _asked(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log(self) -> str:
        return self._processes.log_tail(_NAME)
