"""`python -m embedq_consumer`: one replica."""

import os
import signal
import sys
from typing import NoReturn

if __name__ == "__main__":
    # Before the imports, which take a second or more: nothing is open yet, so that a stop is an end. Without this it would be
    # a death by the signal; or, for process 1 of a container, nothing at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


def _started() -> NoReturn:
    """Read what the process is told, and only then import the service."""
    from embedq_consumer.usage import explain_usage, settings_from

    if sys.argv[1:]:
        sys.exit(explain_usage(sys.argv[1:]))
    settings = settings_from(os.environ)
    if settings is None:
        sys.exit(2)
    try:
        from embedq_consumer.leaving import ExitDeadline, leave
        from embedq_consumer.process import run
    except ModuleNotFoundError as missing:
        sys.exit(f"embedq: the service needs {missing.name}: pip install 'embedq[consumer]'")
    leave(run(settings, ExitDeadline().arm))


if __name__ == "__main__":
    _started()
