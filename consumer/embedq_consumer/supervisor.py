"""Several replicas under one command: a process for each device, told to stop together and gone together.

Each is the ordinary service with a name and a health port of its own; Kafka's consumer group shares the partitions out
among them. A replica that ends takes the others with it, as a failure in one ends its own process: what starts the
command again starts all of them.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog

from embedq_consumer.engine import count_gpus
from embedq_consumer.settings import PREFIX, Settings, SettingsError

_GRACE_S: Final = 60.0
"""Beyond its drain, a replica that was told to stop has so long for the rest: loading may have just begun."""
_PR_SET_PDEATHSIG: Final = 1

log = structlog.get_logger()


class Child(msgspec.Struct, frozen=True):
    """One replica to be: its name, its device and its whole environment."""

    name: str
    device: str
    environ: dict[str, str]


class ExitPolicy:
    """What the replicas' ends mean for the command. Pure; `supervise` acts on it.

    `code` is the command's: 0 only if everything ended well after it was told to, 2 if a setting was wrong.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.code = 0
        self._told = False

    def told(self) -> bool:
        """Somebody wants the command to stop. Whether this is the second time: they will not wait for the drain."""
        again, self._told, self.stopping = self._told, True, True
        return again

    def ended(self, code: int) -> None:
        """A replica ended with this exit code, negative for a signal. Unasked is a failure, whatever the code.

        Our SIGTERM kills one that has not come as far as to listen for it: such a one had accepted nothing.
        """
        if not self.stopping or code not in (0, -signal.SIGTERM):
            self.code = max(self.code, 2 if code == 2 else 1)
        self.stopping = True


def supervise(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run one replica for each of `settings.devices` until told to stop; the exit code.

    The first SIGTERM or SIGINT is passed on as SIGTERM, and each replica drains. A second one ends everything at once.

    Raises:
        SettingsError: there is no such device, or what a replica would be given is out of range.
    """
    with _signals() as until_signal:
        wanted = children(settings, environ, _devices(settings.devices), os.cpu_count() or 1)
        running: dict[str, subprocess.Popen[bytes]] = {}
        verdict = ExitPolicy()
        deadline: float | None = None
        try:
            for child in wanted:
                running[child.name] = _start(child)
                log.info(
                    "replica_started", child=child.name, device=child.device, pid=running[child.name].pid
                )
            while running:
                for number in until_signal(deadline):
                    if number != signal.SIGCHLD and verdict.told():
                        _end_by(number, running)
                for name, process in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[name]
                        verdict.ended(code)
                        log.info("replica_ended", child=name, exit_code=code)
                if verdict.stopping and deadline is None:
                    deadline = time.monotonic() + settings.drain_timeout_s + _GRACE_S
                    for process in running.values():
                        process.terminate()
                if running and deadline is not None and time.monotonic() > deadline:
                    log.error("replicas_killed", children=sorted(running))
                    _kill(running)
        finally:
            _kill(running)
    return verdict.code


def children(
    settings: Settings, environ: Mapping[str, str], devices: Sequence[str], cores: int
) -> list[Child]:
    """What each replica is given. Pure; `settings` has a name, from which theirs follow.

    Raises:
        SettingsError: one of them would be out of range, such as the last health port.
    """
    on_cpu = sum(device == "cpu" for device in devices)
    found = []
    for index, device in enumerate(devices):
        name = f"{settings.replica}-{index}"
        own = {
            "DEVICE": device,
            "REPLICA": name,
            "HTTP_PORT": str(settings.http_port + index if settings.http_port else 0),
        }
        if device == "cpu" and not settings.threads:
            own["THREADS"] = str(max(1, cores // on_cpu))
        inherited = {key: value for key, value in environ.items() if key != f"{PREFIX}DEVICES"}
        theirs = inherited | {f"{PREFIX}{key}": value for key, value in own.items()}
        # Tokenizers start a thread for each core, in every process.
        theirs.setdefault("RAYON_NUM_THREADS", str(max(1, cores // len(devices))))
        Settings.from_env(theirs)
        found.append(Child(name, device, theirs))
    return found


def _devices(wanted: str) -> list[str]:
    if wanted != "all":
        return wanted.split(",")
    count = count_gpus()
    if not count:
        raise SettingsError(f"{PREFIX}DEVICES: all: this machine has no CUDA device")
    return [f"cuda:{index}" for index in range(count)]


def _start(child: Child) -> subprocess.Popen[bytes]:
    """Start one replica, in a session of its own: Ctrl-C in the terminal reaches it through us, once."""
    return subprocess.Popen(
        [sys.executable, "-m", "embedq_consumer"],
        env=child.environ,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509  # tied to the thread that forks, our only one
    )


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Makes a child die with this process, however it dies; only Linux knows how."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


def _kill(running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """End these at once, and wait until they have."""
    for process in running.values():
        process.kill()
    for process in running.values():
        process.wait()


def _end_by(number: int, running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Told twice: everything ends now, this process by the signal itself."""
    for process in running.values():
        process.kill()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def _signals() -> Iterator[Callable[[float | None], list[int]]]:
    """Collect SIGTERM, SIGINT and SIGCHLD. Gives a function that waits for some, until `deadline` if there is one.

    The kernel's order is kept and none is lost between two calls: they arrive through a pipe.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler that does nothing, not SIG_IGN, which the children would inherit.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    signal.set_wakeup_fd(writer)

    def wait(deadline: float | None) -> list[int]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return list(os.read(reader, 64)) if select.select([reader], [], [], left)[0] else []

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
