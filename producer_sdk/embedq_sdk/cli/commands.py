"""The commands of `embedq`.

What a command works with it imports when it runs: this file and those of the commands are loaded for each of them, and for
`--help`, and Kafka's client, numpy and rich take longer than all else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedq_sdk.cli.dlq import dlq
from embedq_sdk.cli.embedding import embed
from embedq_sdk.cli.golden.command import golden
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.models import models, reload, rollback, split
from embedq_sdk.cli.pull import pull
from embedq_sdk.cli.running import NO_ANSWER, run, say
from embedq_shared.topics import (
    DEFAULT_PARTITIONS,
    DEFAULT_REPLY_PARTITIONS,
    DEFAULT_RETRY_TIERS,
    GROUP,
    MAX_RETRY_TIERS,
)

if TYPE_CHECKING:
    from embedq_sdk.admin.control import ServiceStatus

_WATCH_S: Final = 1.0


class Commands(click.Group):
    """embedq's own commands, and those that its heavier packages offer as entry points of `embedq.commands`.

    This package imports none of those; one whose packages are missing is still listed, and says what to install.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_offered()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        entry = _offered().get(cmd_name)  # looks through everything that is installed
        if entry is None:
            return None
        try:
            loaded: click.Command = entry.load()
        except ModuleNotFoundError as missing:
            return _not_installed(cmd_name, str(missing.name))
        return loaded


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="embedq.commands")}


def _corpus_status() -> Any:
    """What `status --corpus` runs: a coroutine function of the batch package, which this one must not import."""
    for entry in importlib.metadata.entry_points(group="embedq.status", name="corpus"):
        with contextlib.suppress(ModuleNotFoundError):
            return entry.load()
    say("status --corpus needs pyarrow: pip install 'embedq[batch]'")
    sys.exit(NO_ANSWER)


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
@click.version_option(package_name="embedq", prog_name="embedq")
def cli() -> None:
    """Text embeddings over Kafka."""


cli.add_command(embed)
cli.add_command(dlq)
for _command in (golden, models, pull, reload, rollback, split):
    cli.add_command(_command)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Print again every second, until Ctrl-C.")
@click.option("--pool", help="Show this pool alone, `default` for the one without a name. Default: all.")
@click.option(
    "--group",
    envvar="EMBEDQ_GROUP",
    default=GROUP,
    show_default=True,
    show_envvar=True,
    help="The service's consumer group, whose lag is shown; that of a pool has the pool's name behind it.",
)
@click.option(
    "--corpus",
    help="Show instead what a target of embedq run (KIND:ADDRESS#NAME, or a file) covers of its source, and what is stale.",
)
@click.option(
    "--from",
    "source",
    multiple=True,
    help="With --corpus: read the source, as embedq run has it, and compare; without, the last pass over it counts.",
)
@click.option(
    "--metrics",
    "as_metrics",
    is_flag=True,
    help="With --corpus: print Prometheus's text format, for the node exporter's textfile collector.",
)
@kafka_options
def status(
    as_json: bool,
    watch: bool,
    pool: str | None,
    group: str,
    corpus: str | None,
    source: tuple[str, ...],
    as_metrics: bool,
    kafka: KafkaTarget,
) -> None:
    """Show the live replicas, and how many jobs wait in each lane; or, with --corpus, how a store of vectors stands."""

    if corpus is not None:
        form = "json" if as_json else "metrics" if as_metrics else "lines"
        with contextlib.suppress(KeyboardInterrupt):
            run(_corpus_status()(corpus, source, form, _WATCH_S if watch else None, kafka))
    if source or as_metrics:
        raise click.UsageError("--from and --metrics are for --corpus")

    import asyncio

    import msgspec
    from rich.console import Console

    from embedq_sdk.admin.control import service_status
    from embedq_sdk.cli.tables import status_lines

    async def look() -> ServiceStatus:
        return await service_status(
            kafka.servers,
            topic_prefix=kafka.prefix,
            pool=pool,
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
@click.option("--pool", help="The job and retry topics of this pool, once the default pool has its own.")
@kafka_options
def create(
    partitions: int,
    reply_partitions: int,
    replication: int | None,
    retry_tiers: int,
    pool: str | None,
    kafka: KafkaTarget,
) -> None:
    """Create the topics that are missing. Existing topics are not changed."""

    from embedq_sdk.admin.topics import create_topics

    async def work() -> int:
        reports = await create_topics(
            kafka.servers,
            prefix=kafka.prefix,
            partitions=partitions,
            reply_partitions=reply_partitions,
            replication=replication,
            retry_tiers=retry_tiers,
            pool=pool,
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
@click.option(
    "--http-port",
    envvar="EMBEDQ_HTTP_PORT",
    type=click.IntRange(0, 65535),
    default=9464,
    show_default=True,
    show_envvar=True,
    help="Where the replica serves its health pages and metrics; 0: any free port, which its log says.",
)
def dev(model: str | None, topics: bool, brokers: int, consumer_log: Path | None, http_port: int) -> None:
    """Run a real Kafka, a real Redis and an HTTP gateway on this machine, until Ctrl-C.

    They have their usual ports, 9092, 6379 and 8080, or other ones if these are taken. The gateway's settings are those of
    `embedq gateway`, from the environment.
    """
    from embedq_sdk.dev.command import run

    sys.exit(run(model=model, topics=topics, brokers=brokers, consumer_log=consumer_log, http_port=http_port))
