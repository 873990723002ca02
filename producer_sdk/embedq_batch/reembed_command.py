"""`embedq reembed`, found by the command line through the entry points `embedq.commands`."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from embedq_batch.command import STOPPED, conclude, run, run_options, shown, until_stopped
from embedq_batch.content.addresses import typed
from embedq_batch.switch_command import told
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, NO_ANSWER, say
from embedq_sdk.cli.running import run as run_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from embedq_batch.content.columns import Columns
    from embedq_batch.corpus.figures import Figures
    from embedq_batch.sources.source import Since


@click.command(name="reembed")
@click.option(
    "--of",
    "store",
    required=True,
    help="The target that serves now, as embedq run has it. It is read alone, and stays as it is.",
)
@click.option(
    "--from",
    "source",
    multiple=True,
    help="Where the texts are, as embedq run has it. Default: the text column of --of, with all of its other columns.",
)
@click.option(
    "--switch",
    "alias",
    help="When all rows are there: make this name, which readers use, mean --to, as embedq switch does.",
)
@kafka_options
def reembed(
    store: str,
    source: tuple[str, ...],
    target: str,
    alias: str | None,
    text_column: str | None,
    template: str | None,
    id_column: str | None,
    keep: tuple[str, ...],
    sql: str | None,
    since: Since | None,
    manifest: Path | None,
    kafka: KafkaTarget,
    **options: Any,
) -> None:
    """Embed the texts of a target anew, under another alias or model, into a new one beside it, while the old one serves.

    The same command again goes on where it was, and after the end follows what has changed since. Exit codes as of embedq run; 1 also
    where --switch found rows missing.
    """
    if importlib.util.find_spec("pyarrow") is None:
        say("reembed needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    import asyncio

    from embedq_batch.api import described
    from embedq_batch.content.columns import Columns
    from embedq_batch.corpus.counting import figures_of
    from embedq_batch.corpus.shown import lines
    from embedq_batch.errors import BadTarget
    from embedq_batch.origins import origin_of
    from embedq_batch.running.progress import Progress
    from embedq_batch.running.run import Parts, execute
    from embedq_batch.sinks.opening import opened_sink
    from embedq_batch.sources.opening import opened_source
    from embedq_batch.switching.switch import switch
    from embedq_sdk.client import EmbedClient

    progress = Progress(time.monotonic())
    again = typed(sys.argv[1:])

    def opened(places: list[str], columns: Columns) -> Any:
        return opened_source(
            places,
            columns,
            query=sql,
            since=since,
            servers=kafka.servers,
            security=kafka.security,
            prefix=kafka.prefix,
        )

    def counted(places: list[str], columns: Columns, version: str) -> Figures:
        """How the new target stands beside the source as it is now."""
        return figures_of(opened_sink(target), opened(places, columns), version, manifest)

    async def work(report: Callable[[str], None]) -> int:
        if target == store:
            raise BadTarget(target=target, reason="is what serves now: --to takes a new one beside it")
        given = Columns(text=text_column, template=template, id=id_column, keep=keep)
        origin = await asyncio.to_thread(origin_of, store, source, given, target)
        _take_over(options, origin.job)
        options["only_changed"] = True
        options["delete_missing"] = options["delete_missing"] or origin.mirrors
        asked = run_options(options, again, described(origin.columns))
        client = EmbedClient(
            kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
        )
        async with client:
            parts = Parts(
                source=await asyncio.to_thread(opened, origin.places, origin.columns),
                sink=await asyncio.to_thread(opened_sink, target),
                client=client,
                options=asked,
                progress=progress,
                manifest=manifest,
            )
            summary = await execute(parts, report)
        code = conclude(summary, asked)
        found = await asyncio.to_thread(counted, origin.places, origin.columns, summary.model_version)
        for line in lines(found):
            click.echo(line)
        if alias is None:
            return code
        if code or found.coverage < 1:
            say(
                f"{alias} is not switched: the same command does what is missing, embedq switch takes it as it is"
            )
            return code or FAILED
        sink = await asyncio.to_thread(opened_sink, target)
        try:
            told(await asyncio.to_thread(switch, alias, target, sink, manifest=manifest))
        finally:
            await asyncio.to_thread(sink.close)
        return 0

    try:
        with shown(progress) as report:
            run_command(until_stopped(work(report)))
    except KeyboardInterrupt:
        say(f"stopped: {progress.line(time.monotonic())}")
        say(f"what is done is kept; this goes on: {again}")
        sys.exit(STOPPED)


def _take_over(given: dict[str, Any], job: dict[str, Any]) -> None:
    """Where an option is not given, what the old vectors were made with."""
    chunk = job.get("chunk") or {}
    for name, value in (job | {"chunk": chunk.get("mode"), "chunk_tokens": chunk.get("tokens")}).items():
        if given[name] is None:
            given[name] = value


_OURS = {each.name for each in reembed.params} | {"only_changed"}
# All else is said as for embedq run.
reembed.params[3:3] = [each for each in run.params if each.name not in _OURS]
