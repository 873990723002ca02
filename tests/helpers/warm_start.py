"""Python programs that start from a process which has imported the service's libraries: PyTorch alone takes seconds each time.

One such process for each worker of the suite, from the first use on. It runs nothing of ours and has one thread; for each start
it forks, and the child gets the program's arguments, environment, directory and log, and runs it as `python -m` would. So a test
still has a process of its own to kill, freeze and look at, whose memory, descriptors and event loop nobody shares.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

_IMPORTED: Final = (
    "embedq_consumer.process",
    "embedq_consumer.engine.loading.loader",
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3",
)
"""What a replica imports by itself, before or while it loads a model."""
_LOOK_EVERY_S: Final = 0.01
_READY: Final = b"ready"
_MOST_BYTES: Final = 1 << 20
"""Of one request, which is mostly its environment."""


class WarmProcess:
    """A started program: what the suite uses of `asyncio.subprocess.Process`, in any event loop."""

    def __init__(self, pid: int, outcome: int) -> None:
        self.pid = pid
        self._outcome = outcome
        self._code: int | None = None

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None and select.select([self._outcome], [], [], 0)[0]:
            self._code = int(
                os.read(self._outcome, 16) or b"-9"
            )  # nothing: the process that starts them has gone
            os.close(self._outcome)
        return self._code

    def send_signal(self, number: int) -> None:
        """Like `os.kill`, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        while (code := self.returncode) is None:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)  # no event loop is told of a grandchild
        return code


def start(module: Sequence[str], environ: Mapping[str, str], log: int) -> WarmProcess | None:
    """Run `python -m MODULE ARGUMENTS` with this environment; `log` is the descriptor of its output. Blocks for milliseconds.

    None where it cannot be: a library has started a thread, which no child would have.
    """
    with _lock:
        if (channel := _channel()) is None:
            return None
        reading, writing = os.pipe()
        request = json.dumps(
            {"argv": list(module), "environ": dict(environ), "cwd": str(Path.cwd())}
        ).encode()
        if len(request) > _MOST_BYTES:
            raise ValueError(f"a request of {len(request)} bytes")
        try:
            socket.send_fds(channel, [request], [log, writing])
        finally:
            os.close(writing)
        return WarmProcess(int(channel.recv(16)), reading)


_lock: Final = threading.Lock()
_open: socket.socket | None = None
_cannot = False


def _channel() -> socket.socket | None:
    """The connection to this worker's starting process; None where there can be none."""
    global _open, _cannot
    if _open is None and not _cannot:
        _open, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _open.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.warm_start", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        atexit.register(_close, _open, process)
        if _open.recv(16) != _READY:
            _open, _cannot = None, True
    return _open


def _close(channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
    channel.close()  # it ends by itself then
    process.wait()


# -- in the process that starts others ---------------------------------------------------------------------------------


def _serve(channel: socket.socket) -> None:
    """Fork for each request until the other side closes, and write down how each child ends."""
    outcomes: dict[int, int] = {}
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([channel.fileno(), woken], [], [])
        if woken in ready:
            with suppress(BlockingIOError):
                os.read(woken, 4096)
            _reap(outcomes)
        if channel.fileno() in ready:
            request, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 2)
            if not request:
                return
            log, outcome = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (woken, wake, channel.detach(), outcome, *outcomes.values()):
                    os.close(each)
                _run(json.loads(request), log)
            outcomes[pid] = outcome
            os.close(log)
            channel.send(b"%d" % pid)


def _reap(outcomes: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        outcome = outcomes.pop(pid)
        try:
            os.write(outcome, b"%d" % os.waitstatus_to_exitcode(status))
        except OSError as error:  # nobody waits for it any more
            if error.errno != errno.EPIPE:
                raise
        os.close(outcome)


def _run(request: dict[str, object], log: int) -> NoReturn:
    """Become the program."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    os.chdir(str(request["cwd"]))
    environ, argv = request["environ"], request["argv"]
    if not isinstance(environ, dict) or not isinstance(argv, list):
        raise TypeError("a request of another kind")
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    sys.argv = [argv[0], *argv[1:]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is never looked at again, so that its pages stay shared
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        if len(os.listdir("/proc/self/task")) == 1:
            connection.send(_READY)
            _serve(connection)
