"""The `embedq` command. This file works without click, orjson and rich, to say that they are missing."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line."""
    if any(importlib.util.find_spec(package) is None for package in ("click", "orjson", "rich")):
        sys.stderr.write("embedq: the command line needs click, orjson and rich: pip install 'embedq[cli]'\n")
        sys.exit(1)
    from embedq_sdk.cli.commands import cli

    cli(prog_name="embedq")
