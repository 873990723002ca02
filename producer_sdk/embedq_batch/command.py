"""`embedq run` and `embedq runs`, found by the command line through the entry points `embedq.commands`.

Its help needs this file: so pyarrow and numpy are imported when a run begins.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedq_batch.content.addresses import typed
from embedq_sdk.cli.dlq import moment
from embedq_sdk.cli.embedding import job_arguments, job_options
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, NO_ANSWER, say
from embedq_sdk.cli.running import run as run_command

if TYPE_CHECKING:
    from embedq_batch.running.options import RunOptions
    from embedq_batch.running.progress import Progress
    from embedq_batch.running.run import Summary
    from embedq_batch.sources.source import Since

STOPPED: Final = 130
"""The exit code after Ctrl-C, as shells have it."""
_REDRAWN_S: Final = 0.5

_OFFSETS: Final = re.compile(r"\d+:\d+(,\d+:\d+)*")


def beginning(ctx: click.Context, param: click.Parameter, value: str | None) -> Since | None:
    """Where records begin to count: a time, or an offset of each partition that is named."""
    if value is None or _OFFSETS.fullmatch(value) is None:
        return moment(ctx, param, value)
    return {
        int(partition): int(offset) for partition, offset in (each.split(":") for each in value.split(","))
    }


@click.command(name="run")
@click.option(
    "--from",
    "source",
    required=True,
    multiple=True,
    help="Where the texts are: .parquet, .csv, .tsv or .jsonl, a path or a glob, several times; - is JSON Lines on standard input; "
    "postgresql://…#TABLE; lancedb:, qdrant: or milvus: as for --to; kafka:TOPIC, of JSON documents; jobs, those that were submitted.",
)
@click.option("--sql", help="For postgresql://…: the rows of this query instead of a table's.")
@click.option(
    "--since",
    callback=beginning,
    help="For kafka:TOPIC and jobs: records from then on, such as 2026-05-01T12:00 or 2h (ago); for kafka:TOPIC also from offsets on, "
    "PARTITION:OFFSET, such as 0:1200,1:900.",
)
@click.option(
    "--to",
    "target",
    required=True,
    help="Where the vectors go: a file .parquet, .jsonl or .npy; lancedb:FOLDER#TABLE, postgresql://…#TABLE, "
    "qdrant:ADDRESS#COLLECTION or milvus:ADDRESS#COLLECTION, where an address is a server's, or a folder or a file; "
    "kafka:TOPIC, of flat JSON records.",
)
@click.option("--text-column", help="The column with the text. Default: text.")
@click.option("--template", help='The text, made of several columns, such as "{title}: {body}".')
@click.option(
    "--id-column", help="The column that tells rows apart. Default: a row's number in the source, from 0."
)
@click.option(
    "--keep", multiple=True, help="A column that goes along to the target; may be given several times."
)
@job_options()
@click.option(
    "--on-model-change",
    type=click.Choice(["finish", "restart", "stop"]),
    default="finish",
    show_default=True,
    help="What a reload in the middle means: finish, then do the rows of the old model again; begin anew at once; or stop.",
)
@click.option("--only-changed", is_flag=True, help="After a complete run: do rows that are new or changed.")
@click.option("--again", is_flag=True, help="Do all rows again, whatever is done.")
@click.option("--retry-errors", is_flag=True, help="Try rows that failed once more.")
@click.option("--delete-missing", is_flag=True, help="Delete from the target what the source no longer has.")
@click.option(
    "--errors",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file for the rows that failed: id, code and message as JSON Lines.",
)
@click.option(
    "--metrics",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file for the run's figures in Prometheus' text format, written anew every 15 s: for the textfile collector of the node exporter.",
)
@click.option(
    "--max-error-share",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Stop when more than this share of the rows failed.",
)
@click.option(
    "--check", type=click.IntRange(0), default=0, help="In the end, embed so many rows anew and compare."
)
@click.option(
    "--manifest",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file that says which rows are done. Default: in the folder NAME.embedq beside the target.",
)
@click.option("--force", is_flag=True, help="Overwrite a file that no run of this kind has made.")
@click.option(
    "--batch-size",
    "job_texts",
    type=click.IntRange(1, 2048),
    default=64,
    show_default=True,
    help="Rows per job.",
)
@click.option(
    "--in-flight", type=click.IntRange(1), default=4096, show_default=True, help="Rows on their way at once."
)
@kafka_options
def run(
    source: tuple[str, ...],
    target: str,
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
    """Embed a table of texts: files in, files or a vector store out.

    Killed at any time, the same command goes on where it was. Exit codes: 0 all rows are done; 1 rows failed, or the check
    did; 2 wrong usage; 3 no Kafka; 130 stopped by Ctrl-C.
    """
    if importlib.util.find_spec("pyarrow") is None:
        say("run needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    import asyncio

    from embedq_batch.api import described
    from embedq_batch.content.columns import Columns
    from embedq_batch.running.progress import Progress
    from embedq_batch.running.run import Parts, execute
    from embedq_batch.sinks.opening import opened_sink
    from embedq_batch.sources.opening import opened_source
    from embedq_sdk.client import EmbedClient

    progress = Progress(time.monotonic())
    again = typed(sys.argv[1:])

    async def work(report: Callable[[str], None]) -> int:
        columns = Columns(text=text_column, template=template, id=id_column, keep=keep)
        asked = run_options(options, again, described(columns))
        # Both import what they need, which takes a while.
        opened = await asyncio.to_thread(
            opened_source,
            source,
            columns,
            query=sql,
            since=since,
            servers=kafka.servers,
            security=kafka.security,
            prefix=kafka.prefix,
        )
        sink = await asyncio.to_thread(opened_sink, target, servers=kafka.servers, security=kafka.security)
        client = EmbedClient(
            kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
        )
        async with client:
            parts = Parts(
                source=opened, sink=sink, client=client, options=asked, progress=progress, manifest=manifest
            )
            summary = await execute(parts, report)
        return conclude(summary, asked)

    try:
        with shown(progress) as report:
            run_command(until_stopped(work(report)))
    except KeyboardInterrupt:
        say(f"stopped: {progress.line(time.monotonic())}")
        say(f"what is done is kept; this goes on: {again}")
        sys.exit(STOPPED)


async def until_stopped(work: Any) -> int:
    """SIGTERM is Ctrl-C: what is done is written down before the process ends."""
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    with suppress(NotImplementedError):  # Windows knows no SIGTERM
        loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return int(await task)
    except asyncio.CancelledError:
        if stopped:
            raise KeyboardInterrupt from None
        raise


def run_options(given: dict[str, Any], command: str, about: dict[str, Any]) -> RunOptions:
    """A run's options, of those that the command takes."""
    from embedq_batch.running.options import RunOptions
    from embedq_sdk.job_options import JobOptions

    job = JobOptions(lane="bulk", **job_arguments(given))
    return RunOptions(job=job, command=command, about=about, **given)


@contextmanager
def shown(progress: Progress) -> Iterator[Callable[[str], None]]:
    """A line that is redrawn where a terminal is, and a line a minute where none is."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield say
        return
    with Live(
        get_renderable=lambda: Text(progress.line(time.monotonic())),
        console=console,
        refresh_per_second=1 / _REDRAWN_S,
        transient=True,
    ):
        yield lambda line: None


def conclude(summary: Summary, options: RunOptions) -> int:
    """Say how the run ended; the exit code."""
    from embedq_batch.running.progress import duration

    rate = summary.embedded / max(summary.seconds, 1e-9)
    cached = f", {summary.cached / summary.embedded:.0%} from the cache" if summary.embedded else ""
    deleted = f", {summary.deleted:,} deleted" if summary.deleted else ""
    device = f", {summary.device_s:,.1f} s of the device" if summary.device_s else ""
    say(
        f"complete: {summary.rows:,} rows under {summary.model_version[:15]}; {summary.embedded:,} embedded in "
        f"{duration(summary.seconds)} ({rate:,.0f} rows/s, {summary.tokens:,} tokens{cached}{device}), {summary.skipped:,} done before{deleted}"
    )
    if not summary.embedded and not summary.skipped:
        say("nothing was to be done: --only-changed does what is new or changed, --again all rows")
    code = 0
    if summary.failed:
        where = f", see {options.errors}" if options.errors else "; --errors FILE lists them"
        say(f"{summary.failed:,} rows failed{where}; --retry-errors tries them once more")
        code = FAILED
    if (check := summary.check) is not None:
        say(
            f"check of {check.rows:,} rows: {check.missing:,} missing, {check.different:,} different, least cosine {check.least:.6f}"
        )
        code = code if check.passed else FAILED
    return code


@click.command(name="runs")
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def runs(folders: tuple[Path, ...]) -> None:
    """List the runs whose manifests are in FOLDERS, by default here, or in folders of these."""
    import sqlite3

    if importlib.util.find_spec("pyarrow") is None:
        say("runs needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    from embedq_batch.manifest.place import FOLDER, MANIFEST
    from embedq_batch.manifest.store import glance, is_locked

    found = False
    for folder in folders or (Path(),):
        for path in sorted(folder.rglob(f"*{FOLDER}/{MANIFEST}")):
            found = True
            try:
                about, state, figures = glance(path)
            except sqlite3.Error as error:
                say(f"{path}: {error}")
                continue
            how = "complete" if state.complete else "running" if is_locked(path) else "stopped"
            versions = ", ".join(f"{count:,} under {name[:15]}" for name, count in figures.versions.items())
            of = "" if state.total is None else f" of {state.total:,}"
            click.echo(
                f"{about.target if about else path}: {how}, {figures.done:,}{of} rows ({versions or 'none'}), {figures.failed:,} failed"
            )
            if how == "stopped" and state.command:
                click.echo(f"  goes on with: {state.command}")
    if not found:
        say("no manifest here")
