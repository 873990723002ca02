"""Waiting until a server answers, with an error that helps when it does not."""

import time
from collections.abc import Callable

from embedq_sdk.dev.errors import PortTakenError, StartError
from embedq_sdk.dev.processes import Processes

START_DEADLINE_S = 60.0
_LOOK_EVERY_S = 0.02
_PORT_TAKEN = "address already in use"


def wait_until_ready(
    processes: Processes, name: str, what: str, ready: Callable[[], bool], deadline: float
) -> None:
    """Return once `ready()` is true; `deadline` is a `time.monotonic()` moment.

    Raises:
        PortTakenError: the server ended because its port is in use.
        StartError: it ended for another reason, or the deadline passed.
    """
    while True:
        code = processes.exit_code(name)
        if code is not None:
            tail = processes.log_tail(name)
            kind = PortTakenError if _PORT_TAKEN in tail.lower() else StartError
            raise kind(f"{what} ended with exit code {code} while starting. {_ADVICE}\n{tail}")
        if ready():
            return
        if time.monotonic() > deadline:
            raise StartError(f"{what} did not answer in time. {_ADVICE}\n{processes.log_tail(name)}")
        time.sleep(_LOOK_EVERY_S)


_ADVICE = (
    "Is there memory and disk space left? To use a server of your own instead, set EMBEDQ_KAFKA_SERVERS "
    "or EMBEDQ_REDIS_URL. The end of its log:"
)
