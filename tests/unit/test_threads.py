"""Threads that can be left behind: calls in order, failures to whoever waits, and a close that waits no longer than it says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from embedq_consumer.threads import WorkerThreads, left_behind
from tests.helpers.support import patient, wait_for


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()
    wait_for(lambda: not ours(), what="threads that end once they can")


def ours() -> list[str]:
    """Those that the tests of this file left behind; other files' may be among the rest."""
    return [name for name in left_behind() if name.startswith("work_")]


def test_calls_run_in_order_on_as_many_threads_as_they_need() -> None:
    threads = WorkerThreads("work", 2)
    calls = [threads.submit(lambda number: (number, threading.current_thread().name), n) for n in range(50)]
    assert [call.result(30)[0] for call in calls] == list(range(50))
    assert {call.result()[1] for call in calls} <= {"work_0", "work_1"}
    assert threads.close()
    assert ours() == []


def test_one_thread_serves_calls_that_come_one_by_one() -> None:
    threads = WorkerThreads("work", 4)
    for _ in range(20):
        assert threads.submit(lambda: threading.current_thread().name).result(30) == "work_0"
        wait_for(lambda: threads._idle._value == 1)
    threads.close()


def test_two_calls_run_at_once_where_there_are_two_threads(gate: threading.Event) -> None:
    threads = WorkerThreads("work", 2)
    barrier = threading.Barrier(2)
    for _ in range(10):
        assert {call.result(30) for call in [threads.submit(barrier.wait, 30) for _ in range(2)]} == {0, 1}
    threads.close()


async def test_what_a_call_raises_reaches_whoever_waits_for_it() -> None:
    class NoException(BaseException):
        pass

    def fails(error: BaseException) -> None:
        raise error

    threads = WorkerThreads("work")
    for error in (KeyError("k"), NoException("n")):
        with pytest.raises(type(error)):
            await asyncio.wrap_future(threads.submit(fails, error))
    assert await asyncio.wrap_future(threads.submit(int, "7")) == 7
    await asyncio.to_thread(threads.close)


def test_a_close_cancels_what_waits_and_leaves_behind_what_hangs(gate: threading.Event) -> None:
    threads = WorkerThreads("work")
    hangs, waits = threads.submit(gate.wait), threads.submit(int)
    wait_for(hangs.running)
    began = time.monotonic()
    assert not threads.close(0.05)
    assert time.monotonic() - began < patient(5)
    assert waits.cancelled()
    assert ours() == ["work_0"]
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(int)


def test_an_interpreter_does_not_wait_for_them() -> None:
    """It does for the standard library's."""
    program = """
import time
from embedq_consumer.threads import WorkerThreads
WorkerThreads("hangs").submit(time.sleep, 1000)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=patient(60), check=False).returncode == 0
