"""Sweep all architectures of the installed transformers, or those that are named: `python -m tests.architectures mpnet t5`.

Prints what became of each; ends with 1 if one has other vectors than transformers', or fails in another way than `ModelError`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.architectures.sweep import Found, sweep
from tests.architectures.tiny_configs import every_kind


def main() -> int:
    """Sweep, and count."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model_type of an architecture; all if none is given")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = sweep(options.kinds or every_kind(), Path(folder), _say)
    counts = Counter(each.verdict for each in found)
    sys.stdout.write(", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + "\n")
    return 1 if any(each.verdict in ("wrong", "escaped") for each in found) else 0


def _say(found: Found) -> None:
    sys.stdout.write(f"{found.verdict:8} {found.kind}: {found.detail}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
