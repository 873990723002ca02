"""The process ends: by itself if it can, by force if not, and then it says what it waited for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from embedq_consumer.leaving import ExitDeadline
from tests.helpers.support import patient, wait_for


def run(*lines: str) -> tuple[int, str, str, float]:
    """(exit code, stdout, stderr, seconds) of a process."""
    program = "\n".join(
        [
            "import asyncio, os, sys, threading, time",
            "from embedq_consumer.leaving import ExitDeadline, leave",
            "from embedq_consumer.telemetry import logs",
            "from embedq_consumer.threads import WorkerThreads",
            "logs.configure()",
            *lines,
        ]
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=patient(60), check=False
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_it_ends_once_its_time_is_over_and_the_time_never_grows() -> None:
    ended = threading.Event()
    now = [100.0]
    deadline = ExitDeadline(lambda: now[0], ended.set)
    deadline.arm(0.2)
    deadline.arm(1000.0)
    assert not ended.is_set()
    now[0] = 101.0
    wait_for(ended.is_set, what="the end")


def test_a_shorter_time_replaces_a_longer_one() -> None:
    ended = threading.Event()
    deadline = ExitDeadline(end=ended.set)
    deadline.arm(1000.0)
    deadline.arm(0.01)
    wait_for(ended.is_set, what="the end")


def test_an_end_that_nothing_hinders_keeps_its_code() -> None:
    code, said, _, _ = run("ExitDeadline().arm(1000)", "leave(7)")
    assert (code, said) == (7, "")


def test_a_thread_that_hangs_in_a_call_is_left_behind_and_named() -> None:
    code, said, _, _ = run(
        'WorkerThreads("load").submit(time.sleep, 1000)', "print('last words')", "leave(0)"
    )
    assert code == 0
    assert "last words" in said
    assert '"event": "threads_left_behind"' in said
    assert "load_0" in said


@pytest.mark.parametrize(
    "hangs",
    [
        "asyncio.run(asyncio.wait_for(asyncio.to_thread(time.sleep, 1000), 0.1))",  # asyncio joins its threads
        "threading.Thread(target=time.sleep, args=(1000,)).start(); leave(0)",  # the interpreter joins this one
        "time.sleep(1000)",
    ],
)
def test_whatever_is_waited_for_the_process_ends_and_says_so(hangs: str) -> None:
    code, said, complained, took = run("ExitDeadline().arm(0.5)", hangs)
    assert code == 1
    assert '"event": "exit_forced"' in said
    assert "most recent call first" in complained  # where each thread was
    assert took < patient(20)


def test_native_code_that_keeps_the_interpreters_lock_does_not_keep_the_process() -> None:
    code, said, _, took = run(
        "import ctypes",
        "ExitDeadline().arm(0.2)",
        "ctypes.PyDLL(None).sleep(1000)",  # PyDLL keeps the lock
    )
    assert (code, said) == (1, "")
    assert took < patient(20)
