"""However the owner of a stack dies, nothing of the stack remains.

A guardian and the kernel treat every server alike; so Kafka is among them once, and where it is paused, and Redis stands for all elsewhere.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest

from embedq_sdk.dev.processes import PREFIX, sweep_abandoned
from tests.helpers.programs import alive, owner, without_kafka
from tests.helpers.support import wait_for

pytestmark = pytest.mark.kafka


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_nothing_remains_of_an_owner_ended_by(number: signal.Signals) -> None:
    with owner(environ=None if number == signal.SIGKILL else without_kafka()) as program:
        assert all(map(alive, program.pids))
        os.kill(program.process.pid, number)
        wait_for(program.gone)


def test_nothing_remains_when_the_owner_is_killed_while_its_kafka_is_paused() -> None:
    with owner(then="stack.pause_kafka(); stack.pause_redis()") as program:
        program.process.kill()
        wait_for(program.gone)


def test_nothing_remains_when_the_owner_is_killed_while_a_forked_copy_of_it_lives_on() -> None:
    """The copy holds the guardian's pipe open, so its end alone would not tell."""
    then = "print('' if os.fork() else time.sleep(600), end='')"
    with owner(then=then, environ=without_kafka()) as program:
        copies = psutil.Process(program.process.pid).children()
        program.process.kill()
        try:
            wait_for(program.gone)
            assert any(copy.is_running() for copy in copies)
        finally:
            for copy in copies:
                copy.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_servers_die_with_a_killed_guardian() -> None:
    with owner(environ=without_kafka()) as program:
        os.kill(program.guardian, signal.SIGKILL)
        wait_for(program.servers_gone)
        _, _ = program.process.communicate()  # ends the block, whose exit removes the files
        assert program.process.returncode == 0
        assert program.gone()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_files_of_a_stack_whose_owner_and_guardian_were_both_killed_go_with_the_next_start() -> None:
    with owner(environ=without_kafka()) as program:
        for pid in (program.process.pid, program.guardian):
            os.kill(pid, signal.SIGSTOP)  # neither gets to see the other's end
        for pid in (program.guardian, program.process.pid):
            os.kill(pid, signal.SIGKILL)
        wait_for(program.servers_gone)
        assert program.directory.exists()
        sweep_abandoned()
        assert program.directory.exists()  # too young: its guardian might be about to lock it
        an_hour_ago = time.time() - 3600
        os.utime(program.directory, (an_hour_ago, an_hour_ago))
        sweep_abandoned()
        assert program.gone()


def test_a_directory_in_use_is_not_swept_however_old() -> None:
    with owner(environ=without_kafka()) as program:
        os.utime(program.directory, (0, 0))
        sweep_abandoned()
        assert program.directory.exists()
        assert program.directory.name.startswith(PREFIX)
        assert all(map(alive, program.pids))


def test_the_guardian_ignores_signals_meant_for_the_owner() -> None:
    with owner(environ=without_kafka()) as program:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(program.guardian, number)
        program.process.communicate()
        assert program.process.returncode == 0
        assert program.gone()
