"""The commands of `embedq`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedq_sdk.admin.control import LostRace, ServiceStatus, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.admin.topics import (
    DEFAULT_PARTITIONS,
    DEFAULT_REPLY_PARTITIONS,
    DEFAULT_RETRY_TIERS,
    MAX_RETRY_TIERS,
    create_topics,
)
from embedq_sdk.cli.dlq import dlq
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, NO_ANSWER, run, say
from embedq_sdk.cli.tables import replica_lines, replica_table, status_lines
from embedq_sdk.cli.vector_files import JsonLines, NpyFile, VectorWriter
from embedq_sdk.client import EmbedClient
from embedq_sdk.errors import InvalidArgument, KafkaUnavailable
from embedq_sdk.job_options import late, mean
from embedq_shared.messages import Chunking
from embedq_shared.topics import GROUP

_WATCH_S: Final = 1.0


class Commands(click.Group):
    """embedq's own commands, and those that its heavier packages offer as entry points of `embedq.commands`.

    This package imports none of those; one whose packages are missing is still listed, and says what to install.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_offered()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        entry = _offered().get(cmd_name)
        if command is not None or entry is None:
            return command
        try:
            loaded: click.Command = entry.load()
        except ModuleNotFoundError as missing:
            return _not_installed(cmd_name, str(missing.name))
        return loaded


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="embedq.commands")}


def _not_installed(name: str, package: str) -> click.Command:
    reason = f"{name} needs {package}: pip install 'embedq[consumer]'"

    def refuse(arguments: tuple[str, ...]) -> None:
        say(reason)
        sys.exit(NO_ANSWER)

    return click.Command(
        name,
        callback=refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"Not installed: {reason}",
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("embedq"), prog_name="embedq")
def cli() -> None:
    """Text embeddings over Kafka."""


@cli.command()
@click.argument("texts", nargs=-1)
@click.option(
    "--file",
    "source",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="A file with one text per line; - is standard input.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write, .jsonl or .npy. Default: JSON lines on standard output.",
)
@click.option("--model", help="The model's alias. Default: the service's own.")
@click.option("--dimensions", type=int, help="Length of each vector. Default: the model's own.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "int8", "binary"]),
    help="How vectors are sent; all but binary are written as float32. Default: float32.",
)
@click.option("--query", "input_type", flag_value="query", help="The texts are search queries.")
@click.option("--document", "input_type", flag_value="document", help="The texts are documents to be found.")
@click.option("--instruction", help="The task that a query serves, for models that take instructions.")
@click.option(
    "--truncate",
    type=click.Choice(["error", "start", "end"]),
    help="Where to cut a text that is too long for the model: its start or its end. Default: error, the text fails.",
)
@click.option(
    "--chunk",
    type=click.Choice(["late", "mean"]),
    help="late: one line for each span of a text; mean: one vector for a text of any length, the mean over its windows.",
)
@click.option("--chunk-tokens", type=int, help="Tokens in each span or window.")
@click.option(
    "--lane",
    type=click.Choice(["interactive", "bulk"]),
    default="interactive",
    show_default=True,
    help="Bulk jobs wait while there are interactive ones.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts per job.")
@click.option(
    "--in-flight", type=click.IntRange(1), default=1024, show_default=True, help="Texts in flight at once."
)
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="Seconds that each job may take."
)
@click.option("--with-text", is_flag=True, help="Repeat each text in its JSON line.")
@kafka_options
def embed(
    texts: tuple[str, ...],
    source: str | None,
    out: Path | None,
    with_text: bool,
    chunk: str | None,
    chunk_tokens: int | None,
    kafka: KafkaTarget,
    **job: Any,
) -> None:
    """Embed TEXTS, the lines of a file, or standard input."""
    if bool(texts) == bool(source):
        raise click.UsageError("give either TEXTS or --file")
    if out is not None and out.suffix not in (".jsonl", ".npy"):
        raise click.BadParameter("expected a name that ends with .jsonl or .npy", param_hint="--out")
    if chunk is None and chunk_tokens is not None:
        raise click.UsageError("--chunk-tokens is for --chunk late or --chunk mean")
    if chunk == "late" and out is not None and out.suffix == ".npy":
        raise click.BadParameter("spans need a .jsonl file, which says where each begins", param_hint="--out")
    try:
        job["chunk"] = _chunking(chunk, chunk_tokens)
    except InvalidArgument as error:
        raise click.BadParameter(str(error), param_hint="--chunk-tokens") from None

    async def work() -> int:
        with contextlib.ExitStack() as stack:
            lines, total = _source(texts, source)
            client = await _connected(kafka)
            try:
                writer = stack.enter_context(_writer(out, with_text))
                advance = stack.enter_context(_progress(total))
                return await _write_all(client, lines, job, writer, advance)
            finally:
                await client.close()

    run(work())


def _chunking(mode: str | None, tokens: int | None) -> Chunking | None:
    if mode == "late":
        return late() if tokens is None else late(tokens)
    return mean(tokens) if mode == "mean" else None


async def _connected(kafka: KafkaTarget) -> EmbedClient:
    """Entered here, before any file is opened, so that a run without Kafka leaves no empty output."""
    client = EmbedClient(
        kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
    )
    return await client.__aenter__()


async def _write_all(
    client: EmbedClient,
    lines: Iterator[str],
    job: dict[str, Any],
    writer: VectorWriter,
    advance: Callable[[], None],
) -> int:
    """Embed and write all lines; the exit code."""
    failed, last = 0, -1
    async with contextlib.aclosing(client.stream(lines, errors="return", **job)) as items:
        async for item in items:
            writer.write(item)
            if item.index == last:  # another span of the same text
                continue
            last = item.index
            if isinstance(item.error, KafkaUnavailable):
                raise item.error
            if item.error is not None:
                failed += 1
                say(f"text {item.index}: {item.error}")
            advance()
    return FAILED if failed else 0


def _source(texts: tuple[str, ...], source: str | None) -> tuple[Iterator[str], int | None]:
    """The texts, and their number if it is known."""
    if source is None:
        return iter(texts), len(texts)
    if source == "-":
        return _lines(sys.stdin.buffer), None
    with open(source, "rb") as counted:
        total = sum(1 for _ in counted)
    return _lines_of(source), total


def _lines_of(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from _lines(file)


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    """A file's lines. Only a line feed ends one: a text may contain any other kind of line break."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InvalidArgument(
                argument="--file", expected="UTF-8", got=f"other bytes in line {number}"
            ) from None


def _writer(out: Path | None, with_text: bool) -> VectorWriter:
    if out is not None and out.suffix == ".npy":
        return NpyFile(out)
    return JsonLines(out, sys.stdout.buffer, with_text=with_text)


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda: bar.advance(task)


@cli.command()
@click.argument("path")
@click.option("--alias", default="default", show_default=True, help="The alias that the model gets.")
@click.option("--digest", help="The model version that must result, sha256:…; replicas refuse any other.")
@click.option(
    "--policy",
    type=click.Choice(["availability", "resource"]),
    default="availability",
    show_default=True,
    help="Load the new model alongside the old one, or after unloading it.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="Least cosine similarity of the new model's check vectors to the old model's. Default: not checked.",
)
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for all replicas."
)
@kafka_options
def reload(
    path: str,
    alias: str,
    digest: str | None,
    policy: str,
    min_cosine: float | None,
    timeout: float,
    kafka: KafkaTarget,
) -> None:
    """Make every replica load the model at PATH, a directory below the service's model root.

    Exit code 0: every live replica is READY. 1: at least one FAILED and keeps its old model. 2: there is no live replica,
    time ran out, or a later command took its place.
    """
    updates = reload_model(
        kafka.servers,
        path,
        alias=alias,
        digest=digest,
        policy="availability_preserving" if policy == "availability" else "resource_preserving",
        min_cosine=min_cosine,
        timeout=timeout,
        topic_prefix=kafka.prefix,
        connect_timeout=CONNECT_TIMEOUT_S,
        **kafka.security,
    )

    async def follow() -> int:
        console = Console()
        last: RolloutUpdate | None = None
        with contextlib.ExitStack() as stack:
            live = stack.enter_context(Live(console=console)) if console.is_terminal else None
            try:
                async with contextlib.aclosing(updates) as reported:
                    async for update in reported:
                        if live is not None:
                            live.update(replica_table(update.replicas, f"{alias} version {update.version}"))
                        else:
                            for line in replica_lines(last, update):
                                click.echo(line)
                        last = update
            except LostRace as error:
                say(str(error))
                return NO_ANSWER
        if last is None:
            raise RuntimeError("a reload ended without an update. This is a bug.")
        return _conclude(last, timeout)

    run(follow())


def _conclude(last: RolloutUpdate, timeout: float) -> int:
    """Report how a reload ended; the exit code."""
    count = len(last.replicas)
    match last.progress:
        case "ready":
            click.echo(f"{last.alias} version {last.version}: READY on {count} of {count} replicas")
            return 0
        case "failed":
            for replica in last.replicas:
                if replica.state == "FAILED":
                    say(f"{replica.replica} FAILED and keeps its old model: {replica.error}")
            return FAILED
        case "no_replicas":
            say(
                f"there is no live replica of {last.alias}; version {last.version} is written, and replicas that start will load it"
            )
        case "superseded":
            say(f"a later command for {last.alias} took the place of version {last.version}")
        case _:
            waiting = [replica.replica for replica in last.replicas if not replica.answered]
            say(
                f"no answer within {timeout:g} s from {', '.join(waiting)}; they continue with version {last.version}"
            )
    return NO_ANSWER


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Print again every second, until Ctrl-C.")
@click.option(
    "--group",
    envvar="EMBEDQ_GROUP",
    default=GROUP,
    show_default=True,
    show_envvar=True,
    help="The service's consumer group, whose lag is shown.",
)
@kafka_options
def status(as_json: bool, watch: bool, group: str, kafka: KafkaTarget) -> None:
    """Show the live replicas, and how many jobs wait in each lane."""

    async def look() -> ServiceStatus:
        return await service_status(
            kafka.servers,
            topic_prefix=kafka.prefix,
            group=group,
            connect_timeout=CONNECT_TIMEOUT_S,
            **kafka.security,
        )

    async def show() -> int:
        console = Console()
        if as_json:
            click.echo(msgspec.json.encode(await look()))
            return 0
        while True:
            found = await look()
            if watch and console.is_terminal:
                console.clear()
            for renderable in status_lines(found, plain=not console.is_terminal):
                console.print(renderable, soft_wrap=True)
            if not watch:
                return 0
            await asyncio.sleep(_WATCH_S)

    with contextlib.suppress(KeyboardInterrupt):
        run(show())


cli.add_command(dlq)


@cli.group()
def topics() -> None:
    """Manage embedq's topics."""


@topics.command()
@click.option(
    "--partitions",
    type=click.IntRange(1),
    default=DEFAULT_PARTITIONS,
    show_default=True,
    help="Partitions of the job, retry, result and dead letter topics: no more replicas than this can share a lane.",
)
@click.option(
    "--reply-partitions",
    type=click.IntRange(1),
    default=DEFAULT_REPLY_PARTITIONS,
    show_default=True,
    help="Partitions of the reply topic: client processes spread over them.",
)
@click.option(
    "--replication",
    type=click.IntRange(1),
    help="Copies of each topic. Default: 3, or one on each broker if there are fewer.",
)
@click.option(
    "--retry-tiers",
    type=click.IntRange(0, MAX_RETRY_TIERS),
    default=DEFAULT_RETRY_TIERS,
    show_default=True,
    help="Retry topics: as many as the service's EMBEDQ_RETRY_DELAYS_S has delays.",
)
@kafka_options
def create(
    partitions: int, reply_partitions: int, replication: int | None, retry_tiers: int, kafka: KafkaTarget
) -> None:
    """Create the topics that are missing. Existing topics are not changed."""

    async def work() -> int:
        reports = await create_topics(
            kafka.servers,
            prefix=kafka.prefix,
            partitions=partitions,
            reply_partitions=reply_partitions,
            replication=replication,
            retry_tiers=retry_tiers,
            connect_timeout=CONNECT_TIMEOUT_S,
            **kafka.security,
        )
        for report in reports:
            done = "created" if report.created else "exists"
            click.echo(f"{report.name}: {done}, {report.partitions} partitions")
            for difference in report.differences:
                say(f"warning: {report.name} {difference}")
        return 0

    run(work())


@cli.command()
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False),
    help="A model directory: also run one replica of the service that serves it.",
)
@click.option("--topics/--no-topics", default=True, show_default=True, help="Create embedq's topics.")
@click.option("--brokers", type=click.IntRange(1, 5), default=1, show_default=True, help="Number of brokers.")
@click.option(
    "--consumer-log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file that the replica's log is appended to. Default: standard output.",
)
def dev(model: str | None, topics: bool, brokers: int, consumer_log: Path | None) -> None:
    """Run a real Kafka and a real Redis on this machine, until Ctrl-C."""
    from embedq_sdk.dev.command import run

    sys.exit(run(model=model, topics=topics, brokers=brokers, consumer_log=consumer_log))
