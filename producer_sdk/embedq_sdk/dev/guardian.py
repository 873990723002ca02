"""The process that owns the servers, so that they cannot outlive the program that started them.

It is run by path as a program of its own (`python -I guardian.py DIRECTORY PARENT`), so it imports nothing of embedq,
and in a session of its own, so a Ctrl-C in the terminal reaches neither it nor the servers. It starts and stops servers
on request: one JSON object per line on stdin, one answer per line on stdout.

- When stdin ends or the parent is gone, however it died, every server gets SIGTERM, then SIGKILL, and DIRECTORY is
  removed.
- When the guardian itself is killed, Linux kills the servers (the parent-death signal). That signal is tied to the
  *thread* that forked, so the process that forks has only one.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

LAST_GRACE_S: Final = 3.0
"""For all servers to stop once the parent is gone; the data need not survive."""
PARENT_CHECK_S: Final = 0.5
"""How often to look for the parent, where stdin does not say that it is gone."""
_PR_SET_PDEATHSIG: Final = 1
"""From <linux/prctl.h>."""


class Guardian:
    """The servers of one stack, by name."""

    def __init__(self) -> None:
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._pid = os.getpid()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says.

        Raises:
            OSError: the program does not exist or may not be run, or the server is running already.
        """
        match request:
            case {"do": "start", "name": name, "argv": argv, "env": env, "log": log}:
                return {"pid": self._start(name, argv, env, log)}
            case {"do": "poll", "name": name}:
                return {"code": self._servers[name].poll()}
            case {"do": "signal", "names": names, "signal": number}:
                servers = [self._servers[name] for name in names]
                for server in servers:
                    self._signal(server, number)
                if number == signal.SIGSTOP:
                    for server in servers:
                        _await_stop(server.pid)
                return {}
            case {"do": "stop", "names": names, "grace_s": grace_s}:
                self._stop([self._servers[name] for name in names if name in self._servers], grace_s)
                return {}
            case other:
                raise ValueError(f"unknown request {other}. This is a bug.")

    def stop_all(self) -> None:
        """Stop every server, in `LAST_GRACE_S` at most."""
        self._stop(list(self._servers.values()), LAST_GRACE_S)

    def _start(self, name: str, argv: list[str], env: dict[str, str], log: str) -> int:
        if name in self._servers and self._servers[name].poll() is None:
            raise OSError(f"{name} is running already")
        with open(log, "ab") as output:
            server = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=os.path.dirname(log),
                start_new_session=True,
                preexec_fn=self._die_with_guardian,  # noqa: PLW1509  # there is only one thread
            )
        self._servers[name] = server
        return server.pid

    def _die_with_guardian(self) -> None:
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._pid:  # the guardian died before the call above
                os._exit(1)

    def _stop(self, servers: list[subprocess.Popen[bytes]], grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        if grace_s > 0:
            for server in servers:
                self._signal(server, signal.SIGTERM)
                self._signal(server, signal.SIGCONT)  # a paused process cannot act on SIGTERM
        for server in servers:
            try:
                server.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._signal(server, signal.SIGKILL)
                server.wait()

    def _signal(self, server: subprocess.Popen[bytes], number: int) -> None:
        if server.poll() is None:
            os.killpg(server.pid, number)


def _await_stop(pid: int) -> None:
    """Return once a child does nothing any more: on a busy machine its threads take a while to hear that they are to stop."""
    if hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
        with suppress(ChildProcessError):  # it has ended, and was waited for
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def hold(directory: Path) -> int:
    """Lock `directory` for as long as this process lives, so that `sweep_abandoned` leaves it alone; the lock's file."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def serve(guardian: Guardian, parent: int) -> None:
    """Answer requests until the parent is gone."""
    pending = b""
    # stdin does not end while a forked copy of the parent holds the pipe open, so the parent's id is checked as well.
    while os.getppid() == parent:
        if not select.select([0], [], [], PARENT_CHECK_S)[0]:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            try:
                reply = guardian.answer(request)
            except OSError as error:  # the caller reports it
                reply = {"error": str(error)}
            os.write(1, json.dumps(reply | {"id": request["id"]}).encode() + b"\n")


def main() -> None:
    """Serve until the parent is gone, then stop every server and remove the directory."""
    directory, parent = Path(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler that does nothing, not SIG_IGN: the servers would inherit an ignored signal, and SIGTERM could not
        # stop them.
        signal.signal(number, lambda *_: None)
    guardian = Guardian()
    hold(directory)
    try:
        serve(guardian, parent)
    except BrokenPipeError:
        pass  # the parent went away while it was being answered
    finally:
        guardian.stop_all()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
