"""Python programs that start from a process which has imported their libraries: PyTorch alone takes a replica seconds each time, and
what a command imports three quarters of the time that it takes.

Two such processes for all workers of the suite, one for replicas and one for commands and gateways, from the first use on until the
last worker ends. They run nothing of ours and have one thread; for each start they fork, and the child gets the program's arguments,
environment, directory and streams, and runs it as `python -m` would. So a test still has a process of its own to kill, freeze and
look at, whose memory, descriptors and event loop nobody shares. What a command imports in an interpreter of its own,
`tests/processes` shows.

A replica that started so has its dry runs started so, too, and a test may have: a process with what PyTorch and transformers take seconds to import,
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
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NoReturn

if TYPE_CHECKING:
    import pytest

Kind = Literal["replica", "command"]

_IMPORTED: Final[dict[Kind, tuple[str, ...]]] = {
    "replica": (
        "embedq_consumer.process",
        "embedq_consumer.engine.loading.loader",
        "torch",
        "transformers.conversion_mapping",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.bert.modeling_bert",
        "transformers.models.qwen3.modeling_qwen3",
    ),
    "command": (
        "embedq_gateway.app",
        "embedq_gateway.serving",
        "embedq_sdk.cli.commands",
    ),
}
"""What a replica and its dry runs, and what a command, import by themselves: at once, or while they run."""
_DRY_RUN: Final = "embedq_consumer.engine.loading.dry_run"
_IN_THE_SUITE: Final = "PYTEST_VERSION" in os.environ
"""A benchmark measures a start as users have it."""
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
            with _unconnected() as channel:
                channel.connect(_serving_at or _address("replica"))
                if channel.recv(16) != _READY:
                    raise ConnectionError("what starts processes is about to end")
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


def start(
    kind: Kind,
    module: Sequence[str],
    environ: Mapping[str, str],
    *,
    out: IO[bytes],
    err: IO[bytes] | None = None,
    stdin: IO[bytes] | None = None,
) -> WarmProcess | None:
    """Run `python -m MODULE ARGUMENTS` with this environment; without `err`, `out` has both. Blocks for milliseconds.

    None outside of the suite, and where it cannot be: a library has started a thread, which no child would have.
    """
    if not _IN_THE_SUITE:
        return None
    with _lock:
        if (channel := _channel(kind)) is None:
            return None
        with Path(os.devnull).open("rb") as nothing:
            streams = ((stdin or nothing).fileno(), out.fileno(), (err or out).fileno())
            return _asked(channel, module, environ, streams)


def start_dry_runs(patch: pytest.MonkeyPatch) -> None:
    """Dry runs of this process start so, too, where they can; else as ever."""
    with _lock:
        if _channel("replica") is not None:
            patch.setattr(importlib.import_module(_DRY_RUN), "Popen", WarmPopen)


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


_lock: Final = threading.Lock()
_open: Final[dict[Kind, socket.socket | None]] = {}


def _channel(kind: Kind) -> socket.socket | None:
    """The connection to the starting process, which the first worker starts; None where there can be none."""
    if kind not in _open:
        address = _address(kind)
        channel, ready = _unconnected(), False
        while True:
            _start(kind, address)
            try:
                channel.connect(address)
                break
            except ConnectionRefusedError:  # who has the address does not listen yet, or no more
                time.sleep(_LOOK_EVERY_S)
        with suppress(ConnectionResetError):
            ready = channel.recv(16) == _READY
        if ready:
            atexit.register(_leave, channel, os.getpid())
        else:
            channel.close()
        _open[kind] = channel if ready else None
    return _open[kind]


def _address(kind: Kind) -> str:
    """Abstract, so that nothing is left of it."""
    return f"\0embedq-warm-{kind}-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"


def _unconnected() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
    return made


def _start(kind: Kind, address: str) -> None:
    """Start the process that starts others, unless a worker has."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        try:
            listening.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return
        listening.listen()
        subprocess.run(
            [sys.executable, "-m", "tests.helpers.warm_start", kind, str(listening.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            check=True,
        )


def _leave(channel: socket.socket, worker: int) -> None:
    """The last worker waits until that process has written down what it ran."""
    if os.getpid() == worker:  # and no fork of it
        with channel, suppress(OSError):
            channel.shutdown(socket.SHUT_WR)
            channel.recv(1)


# -- in the process that starts others ---------------------------------------------------------------------------------


_serving_at = ""
"""The address of the process that starts others, in itself and in all that it has started."""
_channels: Final[list[socket.socket]] = []
"""Those of workers, and of dry runs; the last one stays open until the process has ended."""


def _serve(kind: Kind, listening: socket.socket) -> None:
    """Fork for each request until the last other side closes, and write down how each child ends."""
    global _serving_at
    _serving_at = listening.getsockname().decode()
    outcomes: dict[int, int] = {}
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([listening, woken, *_channels], [], [])
        if woken in ready:
            with suppress(BlockingIOError):
                woken.recv(4096)
            _reap(outcomes)
        if listening in ready:
            _channels.append(listening.accept()[0])
            with suppress(BrokenPipeError):
                _channels[-1].send(_READY)
        for channel in [each for each in _channels if each in ready]:
            if not _start_for(kind, channel, outcomes, [woken, wake, listening, *_channels]):
                if len(_channels) == 1:
                    return
                _channels.remove(channel)
                channel.close()


def _start_for(
    kind: Kind, channel: socket.socket, outcomes: dict[int, int], own: Sequence[socket.socket]
) -> bool:
    """Fork for the next request of `channel`; False if its other side is closed. The child has none of `own`."""
    try:
        request, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, _STREAMS + 1)
    except ConnectionResetError:  # it was killed before it read its last answer
        return False
    if not request:
        return False
    *streams, outcome = descriptors
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (*(its.detach() for its in own), outcome, *outcomes.values()):
            os.close(each)
        _run(kind, json.loads(request), streams)
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


def _run(kind: Kind, request: dict[str, object], streams: Sequence[int]) -> NoReturn:
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
    elif kind == "replica":
        module: Any = importlib.import_module(_DRY_RUN)
        module.Popen = WarmPopen
    code = 0
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    _end(code)


def _end(code: int) -> NoReturn:
    """What an interpreter does at its end, without freeing its memory: that is shared with the process that it was forked from, and each
    page would be copied in order to be freed, which took a replica four times as much of a processor as all that it did before."""
    threading._shutdown()  # type: ignore[attr-defined]  # which waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # it ends with the last worker, which need not be the one that has started it
    wanted: Kind = "replica" if sys.argv[1] == "replica" else "command"
    for name in _IMPORTED[wanted]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is never looked at again, so that its pages stay shared
    with socket.socket(fileno=int(sys.argv[2])) as door:
        if len(os.listdir("/proc/self/task")) == 1:
            _serve(wanted, door)
    gc.unfreeze()  # else nothing frees the libraries' objects at exit, and some complain
