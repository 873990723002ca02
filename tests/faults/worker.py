"""The service, with traps at the named points: what the harness runs in place of `python -m embedq_consumer`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Final

from tests.faults.points import ALL, Trap

ORDERS: Final = "FAULTS_ORDERS"
"""Environment variable: the file with the harness's orders."""


def main() -> int:
    """Set the traps, then be the service."""
    trap = Trap()
    trap.listen(Path(os.environ[ORDERS]))  # first: an untrapped SIGUSR1 would end this process
    from embedq_consumer.process import main as serve

    trap.install(ALL)
    try:
        return serve()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python's end would leave the signal untrapped


if __name__ == "__main__":
    sys.exit(main())
