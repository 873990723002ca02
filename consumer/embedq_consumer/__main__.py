"""`python -m embedq_consumer`: one replica."""

import sys

try:
    from embedq_consumer.leaving import ExitDeadline, leave
    from embedq_consumer.process import main
except ModuleNotFoundError as missing:
    sys.exit(f"embedq: the service needs {missing.name}: pip install 'embedq[consumer]'")

if __name__ == "__main__":
    leave(main(ExitDeadline().arm))
