"""A worker ends itself at the point and the pass that it was told, and at no other; every point exists in the service."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.points import ALL, Order, Point, Trap, give
from tests.helpers.support import patient, wait_for


class Room:
    """Stands for any room."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def sync(self) -> str:
        self.done.append("sync")
        return "returned"

    async def wait(self) -> str:
        self.done.append("sent")
        await asyncio.sleep(0.05)
        self.done.append("answered")
        return "returned"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    for method in ("sync", "wait"):
        monkeypatch.setattr(Room, method, Room.__dict__[method])  # put back after each test
    return Room()


class Signals:
    """What a trap did, and what the room had done by then."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.sent: list[tuple[int, list[str]]] = []

    def __call__(self, number: int) -> None:
        self.sent.append((number, list(self._room.done)))


def trapped(room: Room, method: str, when: str, passes: int = 1) -> Signals:
    signals = Signals(room)
    trap = Trap(signals)
    trap.install({"here": Point((f"{__name__}:Room.{method}",), when)})  # type: ignore[arg-type]
    trap.arm(Order("here", passes, "SIGKILL"))
    return signals


@pytest.mark.parametrize(("when", "done"), [("before", []), ("after", ["sync"])])
def test_a_method_is_cut_before_or_after(room: Room, when: str, done: list[str]) -> None:
    signals = trapped(room, "sync", when)
    assert room.sync() == "returned"
    assert signals.sent == [(signal.SIGKILL, done)]


@pytest.mark.parametrize(
    ("when", "done"), [("before", []), ("during", ["sent"]), ("after", ["sent", "answered"])]
)
async def test_a_coroutine_is_cut_before_during_or_after(room: Room, when: str, done: list[str]) -> None:
    signals = trapped(room, "wait", when)
    assert await room.wait() == "returned"
    assert signals.sent == [(signal.SIGKILL, done)]


def test_only_the_pass_that_was_ordered_counts_and_only_once(room: Room) -> None:
    signals = trapped(room, "sync", "before", passes=3)
    for _ in range(6):
        room.sync()
    assert signals.sent == [(signal.SIGKILL, ["sync", "sync"])]


def test_without_an_order_nothing_happens(room: Room) -> None:
    signals = Signals(room)
    trap = Trap(signals)
    trap.install({"here": Point((f"{__name__}:Room.sync",), "before")})
    room.sync()
    trap.arm(Order("elsewhere", 1, "SIGKILL"))
    room.sync()
    assert signals.sent == []


def test_a_point_whose_method_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match="here"):
        Trap().install({"here": Point((f"{__name__}:Room.removed", "nobody:Room.sync"), "before")})


def test_the_first_method_that_is_there_is_the_point(room: Room) -> None:
    signals = Signals(room)
    trap = Trap(signals)
    methods = ("nobody:Room.sync", f"{__name__}:Room.sync", f"{__name__}:Room.wait")
    trap.install({"here": Point(methods, "before")})
    trap.arm(Order("here", 1, "SIGKILL"))
    room.sync()
    assert len(signals.sent) == 1


def test_every_point_is_there_in_the_service() -> None:
    """In a process of its own, since it wraps the service's classes for good."""
    code = "from tests.faults.points import ALL, Trap; Trap().install(ALL); print(len(ALL))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60), check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(len(ALL))


def test_an_order_reaches_a_process_by_a_file_and_a_signal(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from tests.faults.points import Trap
trap = Trap()
trap.listen(pathlib.Path({str(tmp_path / "orders")!r}))
print("listening", flush=True)
while True:
    trap.passed("here")
    time.sleep(0.01)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        assert give(Order("here", 5, "SIGKILL"), tmp_path / "orders", process.pid)
        assert process.wait(patient(30)) == -signal.SIGKILL


def test_a_process_that_does_not_listen_yet_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not give(Order("here", 1, "SIGKILL"), tmp_path / "orders", process.pid)
        (tmp_path / "orders.pid").write_text("1")  # of the process before
        assert not give(Order("here", 1, "SIGKILL"), tmp_path / "orders", process.pid)
        process.communicate(b"\n", timeout=patient(30))
    assert process.returncode == 0


def test_a_process_that_stopped_itself_goes_on_when_it_is_told(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from tests.faults.points import Trap
trap = Trap()
trap.listen(pathlib.Path({str(tmp_path / "orders")!r}))
print("listening", flush=True)
while trap._order is None:
    time.sleep(0.01)
trap.passed("here")
print("went on", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert give(Order("here", 1, "SIGSTOP"), tmp_path / "orders", process.pid)
        wait_for(lambda: stopped(process.pid), what="a stopped process")
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == b"went on\n"


def stopped(pid: int) -> bool:
    import psutil

    return psutil.Process(pid).status() == psutil.STATUS_STOPPED
