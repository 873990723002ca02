"""A server is waited for until it answers, or until it is known that it never will."""

from __future__ import annotations

import sys
import time

import pytest

from embedq_sdk.dev.errors import PortTakenError, StartError
from embedq_sdk.dev.processes import Processes
from embedq_sdk.dev.starting import wait_until_ready

LATER = 120.0


def ends(said: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({said!r}); sys.exit(1)"]


RUNS = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [("Address already in use", PortTakenError), ("out of memory", StartError)],
)
def test_of_several_servers_that_need_each_other_one_that_ends_is_noticed_at_once(
    said: str, kind: type[StartError]
) -> None:
    with Processes() as processes:
        processes.start("first", RUNS)
        processes.start("second", ends(said))
        with pytest.raises(kind, match="second, which the first needs, ended with exit code 1") as raised:
            wait_until_ready(
                *(processes, "first", "the first", lambda: False, time.monotonic() + LATER),
                needs=["second"],
            )
        assert said in str(raised.value)
        assert isinstance(raised.value, PortTakenError) is (kind is PortTakenError)
