"""Server processes that end with this one, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from embedq_sdk.dev import guardian
from embedq_sdk.dev.errors import DevStackError

PREFIX: Final = "embedq-dev-"
"""Of every stack's temporary directory."""
_ABANDONED_AFTER_S: Final = 60.0
"""A directory that is younger may not have been locked by its guardian yet."""
_LOG_TAIL_LINES: Final = 25
_NOT_INHERITED: Final = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")
"""What users set for Java programs of their own: it must not change our broker, nor be printed to its log."""


class Processes:
    """The guardian process and, through it, the servers, each with a name and a log file.

    Invariants:
        - Everything is in one temporary directory, which is removed when this object is closed or its process dies.
        - One request at a time: calls from several threads wait for each other.
    """

    def __init__(self) -> None:
        sweep_abandoned()
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = threading.Lock()
        self._asked = 0
        with open(self.directory / "guardian.log", "wb") as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", guardian.__file__, str(self.directory), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,  # inherited, it would keep a dead parent's pipes open
                cwd="/",
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def guardian_pid(self) -> int:
        """The guardian's process id."""
        return self._guardian.pid

    def start(self, name: str, argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
        """Start a server, whose output is appended to its log file; its process id.

        Raises:
            DevStackError: the program cannot be run.
        """
        env = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED} | dict(environ or {})
        answer = self._ask(do="start", name=name, argv=list(argv), env=env, log=str(self.log(name)))
        return int(answer["pid"])

    def exit_code(self, name: str) -> int | None:
        """How the server ended: its exit code, or minus the signal; None while it runs."""
        code: int | None = self._ask(do="poll", name=name)["code"]
        return code

    def stop(self, *names: str, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for servers that are still running after `grace_s` seconds; at once with 0."""
        self._ask(do="stop", names=names, grace_s=grace_s)

    def send(self, number: signal.Signals, *names: str) -> None:
        """Send a signal to servers."""
        self._ask(do="signal", names=names, signal=int(number))

    def log(self, name: str) -> Path:
        """The server's log file."""
        return self.directory / f"{name}.log"

    def log_tail(self, name: str) -> str:
        """The last lines of the server's log."""
        path = self.log(name)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:]) or "(the log is empty)"

    def close(self) -> None:
        """Stop every server and remove the directory. Closing twice does nothing."""
        requests, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # the guardian is gone, and its servers with it
            requests.close()
        try:
            self._guardian.wait(guardian.LAST_GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        answers.close()
        shutil.rmtree(self.directory, ignore_errors=True)  # there only if the guardian was killed

    def _ask(self, **request: Any) -> dict[str, Any]:
        requests, answers = self._pipes()
        with self._lock:
            self._asked += 1
            request["id"] = self._asked
            try:
                requests.write(json.dumps(request).encode() + b"\n")
                requests.flush()
                while True:
                    line = answers.readline()
                    if not line:
                        raise DevStackError(f"the guardian process ended:\n{self.log_tail('guardian')}")
                    answer: dict[str, Any] = json.loads(line)
                    if answer["id"] == self._asked:  # else it answers a call that Ctrl-C interrupted
                        break
            except (BrokenPipeError, ValueError) as error:
                raise DevStackError(
                    "the local stack is closed, or its guardian process was killed"
                ) from error
        if "error" in answer:
            raise DevStackError(f"cannot {request['do']} a server: {answer['error']}")
        return answer

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._guardian.stdin is None or self._guardian.stdout is None:
            raise RuntimeError("the guardian was started without pipes. This is a bug.")
        return self._guardian.stdin, self._guardian.stdout


def sweep_abandoned() -> None:
    """Remove the directories of stacks whose guardian was killed together with its parent."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - directory.stat().st_mtime < _ABANDONED_AFTER_S:
                continue
            lock = os.open(directory / "lock", os.O_RDWR)
        except OSError:
            continue  # another user's, or removed just now
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)
