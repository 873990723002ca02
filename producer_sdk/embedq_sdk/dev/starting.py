"""Waiting until a server answers, with an error that helps when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from embedq_sdk.dev.errors import PortTakenError, StartError
from embedq_sdk.dev.processes import Processes

START_DEADLINE_S: Final = 300.0
"""For a server that hangs; one that ends is noticed at once. Most starts take 2 s, and took more than a minute beside
forty busy programs on two cores."""
_CHECK_EVERY_S: Final = 0.02
_PORT_TAKEN: Final = "address already in use"
"""In the log of both servers, in any case of letters."""
_ADVICE: Final = (
    "Is there enough memory and disk space? To use a server of your own, set EMBEDQ_KAFKA_SERVERS "
    "or EMBEDQ_REDIS_URL. The end of its log:"
)


def wait_until_ready(
    processes: Processes,
    name: str,
    what: str,
    ready: Callable[[], bool],
    deadline: float,
    *,
    needs: Sequence[str] = (),
) -> None:
    """Wait until `ready()` is true.

    Args:
        name: of the server's process.
        what: how error messages call the server.
        deadline: a time of `time.monotonic()`.
        needs: the processes without which it is never ready.

    Raises:
        PortTakenError: the server, or one that it needs, ended because its port is in use.
        StartError: one of them ended for another reason, or the deadline passed.
    """
    while True:
        for each in (name, *needs):
            code = processes.exit_code(each)
            if code is not None:
                tail = processes.log_tail(each)
                kind = PortTakenError if _PORT_TAKEN in tail.lower() else StartError
                ended = what if each == name else f"{each}, which {what} needs,"
                raise kind(f"{ended} ended with exit code {code} while starting. {_ADVICE}\n{tail}")
        if ready():
            return
        if time.monotonic() > deadline:
            raise StartError(f"{what} did not answer in time. {_ADVICE}\n{processes.log_tail(name)}")
        time.sleep(_CHECK_EVERY_S)
