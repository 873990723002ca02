"""Several replicas under one command: a process for each device; they are asked to stop together and end together.

Each is the ordinary service with a name and a health port of its own; Kafka's consumer group shares the partitions out
among them. A replica that ends takes the others with it, as a failure in one ends its own process: what starts the
command again starts all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog

from embedq_consumer.engine import count_gpus
from embedq_consumer.settings import PREFIX, Settings, SettingsError

_GRACE_S: Final = 10.0
"""What a replica that was asked to stop has beyond its own limits, after which it leaves by itself."""
_KILLED_S: Final = 10.0
"""What a killed replica has to be gone. One that the kernel keeps, in a call of a driver or a lost disk, is left to it."""
_PR_SET_PDEATHSIG: Final = 1

log = structlog.get_logger()


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """A replica to start: its name, its device and its whole environment."""

    name: str
    device: str
    environ: dict[str, str]


class ExitPolicy:
    """What the replicas' ends mean for the command. Pure; `supervise` acts on it.

    Invariants:

    - `stopping` is true from the first request or the first replica that ended, for good.
    - `code`, the command's exit code, is 0 only if every replica ended well after a request to stop; 2 if one found a
      wrong setting, else 1. It never falls.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.code = 0
        self._requested = False

    def request_stop(self) -> bool:
        """The command is asked to stop. True if it was asked before: then nothing waits for the drain."""
        again, self._requested, self.stopping = self._requested, True, True
        return again

    def child_exited(self, code: int) -> None:
        """A replica ended with this exit code, negative for a signal. Without a request that is a failure.

        Our SIGTERM kills a replica that has not come as far as to listen for it: it had accepted nothing.
        """
        if not self.stopping or code not in (0, -signal.SIGTERM):
            self.code = max(self.code, 2 if code == 2 else 1)
        self.stopping = True


def supervise(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run one replica for each of `settings.devices` until asked to stop; the exit code. Needs the main thread.

    The first SIGTERM or SIGINT is passed on as SIGTERM, and each replica drains. A second one ends everything at once.

    Raises:
        SettingsError: there is no such device, or what a replica would be given is out of range.
        BaseExceptionGroup: of OSError, a replica cannot be started.
    """
    return asyncio.run(_supervise(settings, environ))


async def _supervise(settings: Settings, environ: Mapping[str, str]) -> int:
    """Signals are listened for before anything starts."""
    replicas = _Replicas(stop_within_s=settings.drain_timeout_s + settings.leave_timeout_s + _GRACE_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, replicas.request_stop, number)
    devices = _devices(settings.devices)  # may block for seconds; signals wait until then
    return await replicas.run(children(settings, environ, devices, os.cpu_count() or 1))


class _Replicas:
    """The processes that run. `ExitPolicy` decides; this carries it out."""

    def __init__(self, *, stop_within_s: float) -> None:
        self._stop_within_s = stop_within_s
        self._policy = ExitPolicy()
        self._stopping = asyncio.Event()
        self._running: dict[str, Process] = {}
        self._sent: int | None = None

    def request_stop(self, number: int) -> None:
        """SIGTERM or SIGINT came. The second one ends everything now, this process by the signal itself."""
        if self._policy.request_stop():
            self._signal_all(signal.SIGKILL)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._stopping.set()

    async def run(self, wanted: Sequence[Child]) -> int:
        """Start all, and return the exit code when all have ended."""
        try:
            async with asyncio.TaskGroup() as tasks:
                lives = [tasks.create_task(self._live(child)) for child in wanted]
                await self._stopping.wait()
                self._signal_all(signal.SIGTERM)
                _, late = await asyncio.wait(lives, timeout=self._stop_within_s)
                if late:
                    log.error("replicas_killed", children=sorted(self._running))
                    self._signal_all(signal.SIGKILL)
                    _, kept = await asyncio.wait(lives, timeout=_KILLED_S)
                    for life in kept:
                        self._policy.child_exited(-signal.SIGKILL)
                        life.cancel()
        finally:
            self._signal_all(signal.SIGKILL)
            await self._gone(_KILLED_S)
        return self._policy.code

    async def _gone(self, within_s: float) -> None:
        """Wait for what was killed, but not for ever."""
        ends = [asyncio.create_task(process.wait()) for process in self._running.values()]
        if ends and (await asyncio.wait(ends, timeout=within_s))[1]:
            log.error("replicas_left_behind", children=sorted(self._running))

    async def _live(self, child: Child) -> None:
        """One replica, from its start to its end."""
        process = self._running[child.name] = await _start(child)
        log.info("replica_started", child=child.name, device=child.device, pid=process.pid)
        if self._sent is not None:
            _signal(process, self._sent)  # which came while it started
        code = await process.wait()
        del self._running[child.name]
        self._policy.child_exited(code)
        log.info("replica_ended", child=child.name, exit_code=code)
        self._stopping.set()

    def _signal_all(self, number: int) -> None:
        """Send this to every replica that runs; one that is just being started gets it then, once."""
        self._sent = number
        for process in self._running.values():
            _signal(process, number)


def _signal(process: Process, number: int) -> None:
    """Not `process.send_signal`, which in Python 3.11 may take the exit code away from asyncio, which then reports 255."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


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
        found.append(Child(name=name, device=device, environ=theirs))
    return found


def _devices(wanted: str) -> list[str]:
    if wanted != "all":
        return wanted.split(",")
    count = count_gpus()
    if not count:
        raise SettingsError(f"{PREFIX}DEVICES: all: this machine has no CUDA device")
    return [f"cuda:{index}" for index in range(count)]


async def _start(child: Child) -> Process:
    """Start one replica, in a session of its own: Ctrl-C in the terminal reaches it through us, once."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "embedq_consumer",
        env=child.environ,
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),  # tied to the thread that forks: the loop's, our main one
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
