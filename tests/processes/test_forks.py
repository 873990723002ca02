"""Clients in processes that are forked, interrupted, or end without closing them; without a broker."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.helpers.fresh import ROOT, command, environment, printed
from tests.helpers.support import patient

BEGINNING = """
import os, signal, sys, threading, time
import numpy as np
from embedq_sdk import ClientClosed, client as client_module
from embedq_sdk.blocking import EmbedClient
from tests.helpers.fake_service import FakeService, expected
from tests.helpers.fake_transport import FakeTransport

made = []

def connect(*args, **more):
    made.append(FakeTransport(*args, **more))
    return made[-1]

client_module.KafkaTransport = connect
client = EmbedClient("fake:9092")

def check(text="x"):
    assert np.array_equal(client.embed(text, timeout=60), expected(text))

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception:
            import traceback
            traceback.print_exc()
            os._exit(1)
        sys.exit()  # as a program ends, with everything that it does at its end
    assert os.waitpid(pid, 0)[1] == 0
"""

forks = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")


def test_a_program_that_closes_nothing_ends_quietly() -> None:
    printed(BEGINNING + "check()")
    printed(BEGINNING + "check(); items = client.stream(iter('abc' * 50), batch_size=1); next(items)")
    assert (
        printed(BEGINNING + "import atexit\ncheck()\natexit._clear() if 0 else None\nprint('end')") == "end\n"
    )


def test_the_end_of_a_program_closes_its_clients() -> None:
    """What is registered first runs last."""
    program = "import atexit\natexit.register(lambda: print(made[0].closed))\n" + BEGINNING + "check()"
    assert printed(program) == "True\n"


@forks
def test_a_forked_child_connects_by_itself_and_its_parent_goes_on() -> None:
    printed(
        BEGINNING
        + """
check()
for _ in range(3):
    in_child(check)
    check("y")
assert len(made) == 1 and made[0].opened == 1
"""
    )


@forks
def test_a_client_that_was_never_used_before_the_fork_is_used_in_every_child() -> None:
    """As with gunicorn's --preload."""
    printed(BEGINNING + "for _ in range(3): in_child(check)\ncheck()")


@forks
def test_a_child_of_a_child_connects_by_itself() -> None:
    printed(BEGINNING + "check()\ndef both():\n    check()\n    in_child(check)\n    check()\nin_child(both)")


@forks
def test_a_fork_while_other_threads_use_the_client_leaves_no_lock_behind() -> None:
    printed(
        BEGINNING
        + """
check()  # so that no thread is importing something when the process is forked, which Python itself does not bear
stop = threading.Event()

def busy():
    while not stop.is_set():
        check()

threads = [threading.Thread(target=busy) for _ in range(4)]
for thread in threads:
    thread.start()
try:
    for _ in range(3):
        in_child(check)
finally:
    stop.set()
for thread in threads:
    thread.join()
"""
    )


@forks
def test_a_lock_that_was_held_when_the_process_was_forked_is_not_waited_for() -> None:
    printed(
        BEGINNING
        + """
from embedq_sdk.blocking import session
check()
with session.making():
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        check()
        os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
check()
"""
    )


@forks
def test_a_stream_of_the_parent_does_not_go_on_in_a_child() -> None:
    printed(
        BEGINNING
        + """
items = client.stream(iter("abc" * 50), batch_size=1, in_flight=4)
first = next(items)

def child():
    try:
        next(items)
    except ClientClosed as closed:
        assert "parent process" in closed.__notes__[0]
    else:
        raise AssertionError
    assert len(list(client.stream("abc"[n] for n in range(3)))) == 3

in_child(child)
assert len(list(items)) == 149
"""
    )


@forks
def test_closing_in_a_child_leaves_the_parents_connection() -> None:
    printed(BEGINNING + "check()\nin_child(client.close)\ncheck()\nassert not made[0].closed")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "call",
    [
        "client.embed('x', timeout=600)",
        "client.embed_many(iter('x'), timeout=600)",
        "list(client.stream(['x'], timeout=600))",
        "list(client.stream(iter('xy'), timeout=600))",
        "with client: client.embed('x', timeout=600)",
    ],
)
def test_ctrl_c_leaves_a_call_at_once(call: str) -> None:
    program = (
        BEGINNING
        + f"""
client.open()
made[0].service.behave = lambda job: print("waiting", flush=True)
try:
    {call}
except KeyboardInterrupt:
    while client._session.client.in_flight:
        time.sleep(0.01)
    assert client._session.client._runner.in_flight.held == (0, 0)
    print("left")
"""
    )
    with subprocess.Popen(
        command(program),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=patient(30))
        finally:
            process.kill()
    assert (process.returncode, out.splitlines()[-1], err) == (0, "left", "")


def test_a_cloudpickled_function_carries_its_client_along() -> None:
    """As Spark and Ray send functions to their workers."""
    sent = printed(
        BEGINNING
        + """
import cloudpickle
check()
def shapes(texts):
    for item in client.stream(texts):
        yield item.vector.shape
made = None
print(cloudpickle.dumps(shapes).hex())
"""
    )
    worker = (
        BEGINNING
        + "import pickle\nprint(list(pickle.loads(bytes.fromhex(sys.argv[1]))(iter(['a', 'b']))), len(made))"
    )
    assert printed(worker, sent.strip()) == "[(64,), (64,)] 2\n"
