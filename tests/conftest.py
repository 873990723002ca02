"""What every test gets: a blocked event loop is an error, limits follow the load, and there is a stack to ask for."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings

from tests.helpers.stack import stack, stack_header, used
from tests.helpers.support import patience

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

__all__ = ["stack"]

HERE: Final = Path(__file__).parent

ORDER: Final = (
    "faults",
    "architectures",
    "model/loading/test_broken_reloads.py",
    "broker/service",
    "broker",
    "clients",
    "browser",
    "stores",
    "redis",
    "processes",
    "project",
    "model",
    "gpu",
    "fuzz",
    "unit",
)
"""Folders, and a file, in the order in which their tests run. What mostly waits comes first: with two workers, short and busy tests
then fill the gaps, and neither worker is left alone with a long file at the end."""

_YOUNG_OBJECTS: Final = 10_000
"""After how many new objects the collector looks for garbage: Hypothesis makes many, and hardly any of them is."""

_ROOM: Final = 3.0
"""What a whole test's time is multiplied by at least. Only a test that hangs uses it up."""

# jsonschema would build a grammar of internationalized addresses with it, for a second and a half; no schema of ours has that format.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

settings.register_profile(
    "embedq",
    # New ones are tried each time, so that fewer are enough; CI tries the same ones, and a release is worth more. `make unit`, for
    # whoever tries a change again and again, asks for some.
    max_examples=int(
        os.environ.get("EMBEDQ_TEST_EXAMPLES") or (100 if {"CI", "SOAK"} & os.environ.keys() else 50)
    ),
    # How long an example takes says something about the machine; what is slow by itself, the benchmarks show.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # CI judges a change, so it tries the same examples before and after it; everywhere else new ones are tried each
    # time, and those that fail are kept and tried again.
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("embedq")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker for each core, so one thread for each: OpenMP's threads spin while they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and the programs of the tests would inherit it: Ctrl-C would mean nothing to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def blockbuster() -> BlockBuster:
    """Made once: to look up what may block takes longer than most tests."""
    made = BlockBuster(["embedq_batch", "embedq_consumer", "embedq_gateway", "embedq_sdk", "embedq_shared"])
    # What measures the tests takes a lock where a line runs for the first time, and another thread may have it.
    for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
        made.functions[name].can_block_in("coverage/collector.py", "lock_data")
    return made


@pytest.fixture(autouse=True)
def blocking_calls(blockbuster: BlockBuster) -> Iterator[BlockBuster]:
    """A call of ours that blocks the event loop raises. The tests' own code may block."""
    allowed = {name: len(function.can_block_functions) for name, function in blockbuster.functions.items()}
    blockbuster.activate()
    yield blockbuster
    blockbuster.deactivate()
    for name, count in allowed.items():  # what a test has allowed, it has allowed itself
        del blockbuster.functions[name].can_block_functions[count:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests into ORDER, and leave the order within a folder as it is."""
    items.sort(key=lambda item: _place(item.path.relative_to(HERE).as_posix()))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported meanwhile stays, a million objects that no collection of garbage need look through: not each test's that asks
    for one, nor those that come by themselves."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
        gc.enable()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        atexit.register(_leave)
    else:
        gc.unfreeze()  # else nothing frees the libraries' objects at exit, and some complain


def _leave() -> None:
    """A worker's last step: to free a million objects one by one would take as long as some hundred tests."""
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _place(path: str) -> int:
    return next((n for n, place in enumerate(ORDER) if f"{path}/".startswith(f"{place}/")), len(ORDER))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give the test more time on a busy machine, and on one that may become busy: pytest-timeout reads the mark after this,
    once, and so does not learn of a load that comes later."""
    marked = item.get_closest_marker("timeout")
    seconds = float(marked.args[0] if marked else item.config.getini("timeout"))
    if not item.config.getoption("timeout"):  # the command line has the last word
        item.add_marker(pytest.mark.timeout(seconds * max(_ROOM, patience())), append=False)
    return (yield)


# -- what the tests ran on, in the header and at the end; a worker hands it to the process that prints it ----------------


def pytest_report_header() -> str:
    return stack_header()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(stack_header())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["stack"] = used


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    for line in getattr(node, "workeroutput", {}).get("stack", ()):
        if line not in used:
            used.append(line)
