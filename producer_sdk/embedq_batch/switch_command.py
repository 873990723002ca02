"""`embedq switch`, found by the command line through the entry points `embedq.commands`."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys

import click

from embedq_sdk.cli.running import FAILED, NO_ANSWER, say
from embedq_sdk.errors import EmbedError, InvalidArgument


@click.command(name="switch")
@click.argument("alias")
@click.option(
    "--to",
    "target",
    required=True,
    help="What it shall mean, as embedq run has it: KIND:ADDRESS#NAME, or a file.",
)
@click.option("--force", is_flag=True, help="Switch to what is not complete, too.")
def switch(alias: str, target: str, force: bool) -> None:
    """Make ALIAS, a name that readers use, mean another target, in one step.

    An alias in Qdrant and Milvus, a view in PostgreSQL, a symbolic link to a file. The same command with the former target switches
    back.
    """
    if importlib.util.find_spec("pyarrow") is None:
        say("switch needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    from embedq_batch.errors import BadTarget
    from embedq_batch.manifest.store import glance
    from embedq_batch.sinks.opening import opened_sink

    try:
        sink = opened_sink(target)
        try:
            if not force and sink.manifest.exists() and not glance(sink.manifest)[1].complete:
                raise BadTarget(
                    target=sink.name, reason="its run is not complete; --force switches to it as it is"
                )
            if not hasattr(sink, "point"):
                raise BadTarget(target=sink.name, reason="has no aliases")
            before = sink.point(alias)
        finally:
            sink.close()
    except (InvalidArgument, sqlite3.Error) as error:
        say(str(error))
        sys.exit(NO_ANSWER)
    except EmbedError as error:
        say(str(error))
        sys.exit(FAILED)
    say(f"{alias} is {sink.name}" + ("" if before is None else f"; it was {before}"))
