"""The `embedq` command. This file works without click and rich, to say that they are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        sys.stderr.write("embedq: the command line needs click and rich: pip install 'embedq[cli]'\n")
        sys.exit(1)
    from embedq_sdk.cli.commands import cli

    cli(prog_name="embedq")
