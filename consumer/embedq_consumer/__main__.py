"""`python -m embedq_consumer`: one replica."""

import os
import signal
import sys

if __name__ == "__main__":
    # Before the imports, which take a second or more: nothing is open yet, so that a stop is an end. Without this it would be
    # a death by the signal; or, for process 1 of a container, nothing at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

try:
    from embedq_consumer.leaving import ExitDeadline, leave
    from embedq_consumer.process import explain_usage, main
except ModuleNotFoundError as missing:
    sys.exit(f"embedq: the service needs {missing.name}: pip install 'embedq[consumer]'")

if __name__ == "__main__":
    leave(explain_usage(sys.argv[1:]) if sys.argv[1:] else main(ExitDeadline().arm))
