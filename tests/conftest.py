"""What every test gets: a blocked event loop is an error, and the local stack is there for who asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.helpers.stack import stack, stack_header

__all__ = ["stack"]


@pytest.fixture(autouse=True)
def blocking_calls() -> Iterator[BlockBuster]:
    """A call of ours that blocks the event loop raises. The tests' own code may block."""
    with blockbuster_ctx(scanned_modules=["embedq_consumer", "embedq_sdk", "embedq_shared"]) as blockbuster:
        yield blockbuster


def pytest_report_header() -> str:
    return stack_header()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(stack_header())
