"""`embedq switch`, found by the command line through the entry points `embedq.commands`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedq_sdk.cli.running import FAILED, NO_ANSWER, say
from embedq_sdk.errors import EmbedError, InvalidArgument

if TYPE_CHECKING:
    from embedq_batch.switching.switch import Switched


@click.command(name="switch")
@click.argument("alias")
@click.option(
    "--to",
    "target",
    required=True,
    help="What it shall mean, as embedq run has it: KIND:ADDRESS#NAME, or a file.",
)
@click.option("--force", is_flag=True, help="Switch to what is not complete, too.")
@click.option(
    "--manifest",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The target's manifest, where it is not in its usual place.",
)
def switch(alias: str, target: str, force: bool, manifest: Path | None) -> None:
    """Make ALIAS, a name that readers use, mean another target, in one step.

    An alias in Qdrant and Milvus, a view in PostgreSQL, a symbolic link to a file; or, where ALIAS ends with .json, a pointer file to any
    target. The same command with the former target switches back.
    """
    if importlib.util.find_spec("pyarrow") is None:
        say("switch needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    from embedq_batch.sinks.opening import opened_sink
    from embedq_batch.switching.switch import switch as switched

    try:
        sink = opened_sink(target)
        try:
            done = switched(alias, target, sink, manifest=manifest, force=force)
        finally:
            sink.close()
    except InvalidArgument as error:
        say(str(error))
        sys.exit(NO_ANSWER)
    except EmbedError as error:
        say(str(error))
        sys.exit(FAILED)
    told(done)


def told(done: Switched) -> None:
    """Say what a switch did, and what to type to go back."""
    rows = "" if done.rows is None else f", {done.rows:,} rows under {str(done.model_version)[:15]}"
    say(f"{done.alias} is {done.target}{rows}" + ("" if done.before is None else f"; it was {done.before}"))
    if done.back is not None:
        say(f"back: {shlex.join(['embedq', 'switch', done.alias, '--to', done.back])}")
