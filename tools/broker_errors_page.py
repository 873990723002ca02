"""Writes docs/broker-errors.md from the table in the code; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from embedq_consumer.delivery.broker_errors import page

PAGE = Path(__file__).parents[1] / "docs" / "broker-errors.md"


def main(arguments: list[str]) -> int:
    """The exit code: 1 if the page is not what the table says."""
    if arguments == ["--check"]:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE.name} is out of date: run `make docs`", file=sys.stderr)  # noqa: T201
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
