"""Server processes that end with this one, whatever ends it."""

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
from typing import Any, Self

from embedq_sdk.dev import guardian
from embedq_sdk.dev.errors import DevStackError

PREFIX = "embedq-dev-"
_ABANDONED_AFTER_S = 60.0
_LOG_TAIL_LINES = 25
# A user's settings for his own Java programs must not reach our broker, nor print on its log.
_NOT_INHERITED = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")


class Processes:
    """The guardian process, and through it the servers, each with a name and a log file.

    Everything lives in one temporary directory, which goes when this object is closed or its process dies.
    Safe to call from several threads; calls are answered one at a time.
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
                stderr=log,  # an inherited one would keep a dead parent's pipes open
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
        return self._guardian.pid

    def start(self, name: str, argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
        """Start a server and return its process id. Its output is appended to its log file."""
        env = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED} | dict(environ or {})
        answer = self._ask(do="start", name=name, argv=list(argv), env=env, log=str(self.log(name)))
        return int(answer["pid"])

    def exit_code(self, name: str) -> int | None:
        """Return how the server ended, or None while it runs. Negative: the signal that ended it."""
        code: int | None = self._ask(do="poll", name=name)["code"]
        return code

    def stop(self, *names: str, grace_s: float) -> None:
        """End servers: SIGTERM, and SIGKILL for those still there after `grace_s` seconds (at once with 0)."""
        self._ask(do="stop", names=names, grace_s=grace_s)

    def send(self, number: signal.Signals, *names: str) -> None:
        self._ask(do="signal", names=names, signal=int(number))

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log_tail(self, name: str) -> str:
        path = self.log(name)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:]) or "(the log is empty)"

    def close(self) -> None:
        """End every server and remove the directory. Closing twice does nothing."""
        assert self._guardian.stdin is not None
        assert self._guardian.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the guardian is gone, and its servers with it
            self._guardian.stdin.close()
        try:
            self._guardian.wait(guardian.LAST_GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        self._guardian.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)  # already done, unless the guardian was killed

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._guardian.stdin is not None
        assert self._guardian.stdout is not None
        with self._lock:
            self._asked += 1
            request["id"] = self._asked
            try:
                self._guardian.stdin.write(json.dumps(request).encode() + b"\n")
                self._guardian.stdin.flush()
                while True:
                    line = self._guardian.stdout.readline()
                    if not line:
                        raise DevStackError(f"the guardian process ended:\n{self.log_tail('guardian')}")
                    answer: dict[str, Any] = json.loads(line)
                    if answer["id"] == self._asked:  # an older one: its call was interrupted by Ctrl-C
                        break
            except (BrokenPipeError, ValueError) as error:
                raise DevStackError(
                    "the local stack is closed, or its guardian process was killed"
                ) from error
        if "error" in answer:
            raise DevStackError(f"cannot {request['do']} a server: {answer['error']}")
        return answer


def sweep_abandoned() -> None:
    """Remove directories whose guardian was killed together with its parent."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - directory.stat().st_mtime < _ABANDONED_AFTER_S:
                continue  # perhaps its guardian has not come to lock it yet
            lock = os.open(directory / "lock", os.O_RDWR)
        except OSError:
            continue  # somebody else's, or just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)
