"""Python programs that start from a process which has imported the service's libraries: PyTorch alone takes seconds each time.

One such process for each worker of the suite, from the first use on. It runs nothing of ours and has one thread; for each start
it forks, and the child gets the program's arguments, environment, directory and log, and runs it as `python -m` would. So a test
still has a process of its own to kill, freeze and look at, whose memory, descriptors and event loop nobody shares.

A replica that started so has its dry runs started so, too: a process with what PyTorch and transformers take seconds to import,
for each model that it meets. What starts it otherwise, and that it ends with its replica, `tests/model/loading/test_dry_run.py`
shows, and each test whose replica is started by a command of its own.
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
from typing import IO, Any, Final, NoReturn

_IMPORTED: Final = (
    "embedq_consumer.process",
    "embedq_consumer.engine.loading.loader",
    "torch",
    "transformers.conversion_mapping",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3",
)
"""What a replica and its dry runs import by themselves, before or while they load a model."""
_LOOK_EVERY_S: Final = 0.01
_READY: Final = b"ready"
_MOST_BYTES: Final = 1 << 20
"""Of one request, which is mostly its environment."""
_STREAMS: Final = 3
"""Descriptors of a program: what it reads, and the two that it writes."""


class WarmProcess:
    """A started program: what the suite uses of `asyncio.subprocess.Process`, in any event loop."""

    def __init__(self, pid: int, outcome: int) -> None:
        self.pid = pid
        self._outcome = outcome
        self._code: int | None = None
        self._lock = threading.Lock()

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self._code is None and select.select([self._outcome], [], [], 0)[0]:
                # Nothing: the process that starts them has gone.
                self._code = int(os.read(self._outcome, 16) or b"-9")
                os.close(self._outcome)
            return self._code

    def send_signal(self, number: int) -> None:
        """Like `os.kill`, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def within(self, seconds: float | None) -> int | None:
        """Its exit code, once it has ended; None if it has not by then. Blocks."""
        if self._code is None:
            select.select([self._outcome], [], [], seconds)
        return self.returncode

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        while (code := self.returncode) is None:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)  # no event loop is told of a grandchild
        return code


class WarmPopen:
    """What a dry run uses of `subprocess.Popen`, for the process of a dry run started by the process that started us."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        start_new_session: bool,
    ) -> None:
        if (list(command[:2]), stdin, start_new_session) != ([sys.executable, "-m"], subprocess.PIPE, True):
            raise ValueError(f"a start of another kind: {command}")
        reading, self._writing = os.pipe()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
                channel.connect(_address(os.getppid()))
                streams = (reading, stdout.fileno(), stderr.fileno())
                self._process = _asked(channel, command[2:], env, streams, parent=os.getpid())
        finally:
            os.close(reading)
        self.args = command

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def communicate(self, wanted: bytes, timeout: float) -> None:
        with suppress(BrokenPipeError), os.fdopen(self._writing, "wb") as pipe:
            pipe.write(wanted)
        if self._process.within(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        self._process.within(None)


def start(module: Sequence[str], environ: Mapping[str, str], log: int) -> WarmProcess | None:
    """Run `python -m MODULE ARGUMENTS` with this environment; `log` is the descriptor of its output. Blocks for milliseconds.

    None where it cannot be: a library has started a thread, which no child would have.
    """
    with _lock:
        if (channel := _channel()) is None:
            return None
        with Path(os.devnull).open("rb") as nothing:
            return _asked(channel, module, environ, (nothing.fileno(), log, log))


def _asked(
    channel: socket.socket,
    argv: Sequence[str],
    environ: Mapping[str, str],
    streams: tuple[int, int, int],
    *,
    parent: int | None = None,
) -> WarmProcess:
    """Have the starting process fork one that runs this. `parent`: whose child it believes to be."""
    request = json.dumps(
        {"argv": list(argv), "environ": dict(environ), "cwd": str(Path.cwd()), "parent": parent}
    ).encode()
    if len(request) > _MOST_BYTES:
        raise ValueError(f"a request of {len(request)} bytes")
    reading, writing = os.pipe()
    try:
        socket.send_fds(channel, [request], [*streams, writing])
    finally:
        os.close(writing)
    return WarmProcess(int(channel.recv(16)), reading)


def _address(starting: int) -> str:
    """Where that process listens; abstract, so that nothing is left of it."""
    return f"\0embedq-warm-start-{starting}"


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
                stdin=subprocess.DEVNULL,
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
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(_address(os.getpid()))
    listening.listen()
    own = [woken, wake, channel, listening]
    while True:
        ready, _, _ = select.select([channel, listening, woken], [], [])
        if woken in ready:
            with suppress(BlockingIOError):
                woken.recv(4096)
            _reap(outcomes)
        if listening in ready:
            asking, _ = listening.accept()
            with asking:
                _start_for(asking, outcomes, [*own, asking])
        if channel in ready and not _start_for(channel, outcomes, own):
            return


def _start_for(channel: socket.socket, outcomes: dict[int, int], own: Sequence[socket.socket]) -> bool:
    """Fork for the next request of `channel`; False if its other side is closed. The child has none of `own`."""
    request, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, _STREAMS + 1)
    if not request:
        return False
    *streams, outcome = descriptors
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (*(its.detach() for its in own), outcome, *outcomes.values()):
            os.close(each)
        _run(json.loads(request), streams)
    outcomes[pid] = outcome
    for each in streams:
        os.close(each)
    with suppress(BrokenPipeError):  # who asked was killed meanwhile
        channel.send(b"%d" % pid)
    return True


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


def _run(request: dict[str, object], streams: Sequence[int]) -> NoReturn:
    """Become the program."""
    for target, source in enumerate(streams):
        os.dup2(source, target)
    for source in streams:
        os.close(source)
    os.chdir(str(request["cwd"]))
    environ, argv, parent = request["environ"], request["argv"], request["parent"]
    if not isinstance(environ, dict) or not isinstance(argv, list):
        raise TypeError("a request of another kind")
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    sys.argv = [argv[0], *argv[1:]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if isinstance(parent, int):
        os.setsid()
        os.getppid = lambda: parent
    else:
        dry_run: Any = importlib.import_module("embedq_consumer.engine.loading.dry_run")
        dry_run.Popen = WarmPopen
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
    gc.unfreeze()  # else nothing frees the libraries' objects at exit, and some complain
