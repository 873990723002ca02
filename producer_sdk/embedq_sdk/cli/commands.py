"""The commands of `embedq`. Exit codes: 0 all went well, 1 something failed, 2 wrong usage or no answer, 3 no Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedq_sdk.admin.control import LostRace, ServiceStatus, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.admin.topics import DEFAULT_PARTITIONS, DEFAULT_REPLY_PARTITIONS, create_topics
from embedq_sdk.cli.tables import replica_lines, replica_table, status_lines
from embedq_sdk.cli.vector_files import JsonLines, NpyFile, VectorWriter
from embedq_sdk.client import EmbedClient
from embedq_sdk.errors import EmbedError, InvalidArgument, KafkaUnavailable
from embedq_sdk.job_options import late, mean
from embedq_shared.messages import Chunking

FAILED = 1
NO_ANSWER = 2
NO_KAFKA = 3

Command = TypeVar("Command", bound=Callable[..., Any])


def connected(command: Command) -> Command:
    """The options that say where Kafka is, gathered in `kafka`."""
    options = [
        click.option(
            "--servers",
            envvar="EMBEDQ_KAFKA_SERVERS",
            required=True,
            show_envvar=True,
            help="Kafka's address: host:port, several with commas.",
        ),
        click.option("--prefix", envvar="EMBEDQ_TOPIC_PREFIX", default="embed", show_default=True),
        click.option("--security-protocol", envvar="EMBEDQ_KAFKA_SECURITY_PROTOCOL", show_envvar=True),
        click.option("--ssl-cafile", envvar="EMBEDQ_KAFKA_SSL_CAFILE", type=click.Path(exists=True)),
        click.option("--sasl-mechanism", envvar="EMBEDQ_KAFKA_SASL_MECHANISM"),
        click.option("--sasl-username", envvar="EMBEDQ_KAFKA_SASL_USERNAME"),
        click.option("--sasl-password", envvar="EMBEDQ_KAFKA_SASL_PASSWORD", show_envvar=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _security(options: dict[str, Any]) -> dict[str, Any]:
    """What aiokafka takes, out of the options of `connected`."""
    cafile = options.pop("ssl_cafile")
    security = {
        "security_protocol": options.pop("security_protocol"),
        "sasl_mechanism": options.pop("sasl_mechanism"),
        "sasl_plain_username": options.pop("sasl_username"),
        "sasl_plain_password": options.pop("sasl_password"),
    }
    if str(security["security_protocol"]).endswith("SSL"):
        import ssl

        security["ssl_context"] = ssl.create_default_context(cafile=cafile)
    return {name: value for name, value in security.items() if value is not None}


def _run(work: Coroutine[Any, Any, int]) -> None:
    """Run a command and leave with its exit code; what users can mend is one line, never a traceback."""
    # Every failed connection is a log line of aiokafka's; our one line says it all.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    logging.getLogger("aiokafka").propagate = False
    try:
        code = asyncio.run(work)
    except KafkaUnavailable as error:
        _say(str(error))
        code = NO_KAFKA
    except InvalidArgument as error:
        _say(str(error))
        code = NO_ANSWER
    except EmbedError as error:
        _say(str(error))
        code = FAILED
    sys.exit(code)


def _say(line: str) -> None:
    click.echo(f"embedq: {line}", err=True)


class Commands(click.Group):
    """embedq's own commands, and those that its heavier packages offer as entry points of `embedq.commands`.

    So this package imports none of them, and a command whose packages are missing is listed and says what it needs.
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

    def say(arguments: tuple[str, ...]) -> None:
        _say(reason)
        sys.exit(NO_ANSWER)

    return click.Command(
        name,
        callback=say,
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
    "--file", "source", type=click.Path(dir_okay=False, allow_dash=True), help="One text a line; - is stdin."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="A .jsonl or .npy file; else stdout."
)
@click.option("--model", help="The model's alias.")
@click.option("--dimensions", type=int)
@click.option("--dtype", type=click.Choice(["float32", "float16", "int8", "binary"]))
@click.option("--query", "input_type", flag_value="query", help="The texts are queries.")
@click.option("--document", "input_type", flag_value="document", help="The texts are documents.")
@click.option("--instruction", help="What the query is for.")
@click.option("--truncate", type=click.Choice(["error", "start", "end"]))
@click.option(
    "--chunk",
    type=click.Choice(["late", "mean"]),
    help="late: a line for each span of a text; mean: one vector, over windows of a text of any length.",
)
@click.option("--chunk-tokens", type=int, help="Tokens in a span or window.")
@click.option("--lane", type=click.Choice(["interactive", "bulk"]), default="interactive", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts in one job.")
@click.option("--in-flight", type=click.IntRange(1), default=1024, show_default=True, help="Texts under way.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds for each job.")
@click.option("--with-text", is_flag=True, help="Repeat each text in the JSON lines.")
@connected
def embed(
    texts: tuple[str, ...],
    source: str | None,
    out: Path | None,
    servers: str,
    prefix: str,
    with_text: bool,
    chunk: str | None,
    chunk_tokens: int | None,
    **options: Any,
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
        options["chunk"] = _chunking(chunk, chunk_tokens)
    except InvalidArgument as error:
        raise click.BadParameter(str(error), param_hint="--chunk-tokens") from None
    security = _security(options)
    _run(_embed(texts, source, out, servers, prefix, with_text, security, options))


def _chunking(mode: str | None, tokens: int | None) -> Chunking | None:
    if mode == "late":
        return late() if tokens is None else late(tokens)
    return mean(tokens) if mode == "mean" else None


async def _embed(
    texts: tuple[str, ...],
    source: str | None,
    out: Path | None,
    servers: str,
    prefix: str,
    with_text: bool,
    security: dict[str, Any],
    options: dict[str, Any],
) -> int:
    failed, done = 0, -1
    with contextlib.ExitStack() as stack:
        lines, total = _source(texts, source)
        client = await _entered(EmbedClient(servers, topic_prefix=prefix, connect_timeout=5.0, **security))
        try:
            writer = stack.enter_context(_writer(out, with_text))
            advance = stack.enter_context(_progress(total))
            async with contextlib.aclosing(client.stream(lines, errors="return", **options)) as items:
                async for item in items:
                    writer.write(item)
                    if item.index == done:  # another span of the same text
                        continue
                    done = item.index
                    if isinstance(item.error, KafkaUnavailable):
                        raise item.error
                    if item.error is not None:
                        failed += 1
                        _say(f"text {item.index}: {item.error}")
                    advance()
        finally:
            await client.close()
    return FAILED if failed else 0


async def _entered(client: EmbedClient) -> EmbedClient:
    """Entered before any file is touched, so that a run without Kafka leaves no empty output."""
    return await client.__aenter__()


def _source(texts: tuple[str, ...], source: str | None) -> tuple[Iterator[str], int | None]:
    """The texts, and how many they are if that is known."""
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
    """A file's lines. Only line feeds end one: a text may hold every other kind of line break."""
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
    """A bar on stderr where a person looks at it."""
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
@click.option("--alias", default="default", show_default=True)
@click.option("--digest", help="The model version that must come out: sha256:…")
@click.option(
    "--policy",
    type=click.Choice(["availability", "resource"]),
    default="availability",
    show_default=True,
    help="Load beside the old model, or after unloading it.",
)
@click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Least likeness to the old model's vectors.")
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for all replicas."
)
@connected
def reload(
    path: str,
    alias: str,
    digest: str | None,
    policy: str,
    min_cosine: float | None,
    timeout: float,
    servers: str,
    prefix: str,
    **options: Any,
) -> None:
    """Make every replica load the model at PATH, a directory below the service's model root.

    Returns when every live replica is READY (exit code 0) or FAILED and keeps its old model (1); 2 if nobody is there,
    if time ran out, or if another command came in between.
    """
    updates = reload_model(
        servers,
        path,
        alias=alias,
        digest=digest,
        policy="availability_preserving" if policy == "availability" else "resource_preserving",
        min_cosine=min_cosine,
        timeout=timeout,
        topic_prefix=prefix,
        connect_timeout=5.0,
        **_security(options),
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
                _say(str(error))
                return NO_ANSWER
        assert last is not None
        return _conclude(last, timeout)

    _run(follow())


def _conclude(last: RolloutUpdate, timeout: float) -> int:
    """Say how a reload ended; its exit code."""
    count = len(last.replicas)
    match last.progress:
        case "ready":
            click.echo(f"{last.alias} version {last.version}: READY on {count} of {count} replicas")
            return 0
        case "failed":
            for replica in last.replicas:
                if replica.state == "FAILED":
                    _say(f"{replica.replica} FAILED and keeps its old model: {replica.error}")
            return FAILED
        case "no_replicas":
            _say(
                f"no live replica serves {last.alias}; version {last.version} is written, and replicas that start will load it"
            )
        case "superseded":
            _say(f"a later command for {last.alias} took the place of version {last.version}")
        case _:
            waiting = [replica.replica for replica in last.replicas if not replica.answered]
            _say(
                f"no answer within {timeout:g} s from {', '.join(waiting)}; they go on with version {last.version}"
            )
    return NO_ANSWER


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@connected
def status(as_json: bool, watch: bool, servers: str, prefix: str, **options: Any) -> None:
    """Show the live replicas and how many jobs wait in each lane."""
    security = _security(options)

    async def look() -> ServiceStatus:
        return await service_status(servers, topic_prefix=prefix, connect_timeout=5.0, **security)

    async def show() -> int:
        console = Console()
        if as_json:
            click.echo(msgspec.json.encode(await look()))
            return 0
        if not watch:
            for renderable in status_lines(await look(), plain=not console.is_terminal):
                console.print(renderable, soft_wrap=True)
            return 0
        while True:
            found = await look()
            if console.is_terminal:
                console.clear()
            for renderable in status_lines(found, plain=not console.is_terminal):
                console.print(renderable, soft_wrap=True)
            await asyncio.sleep(1.0)

    with contextlib.suppress(KeyboardInterrupt):
        _run(show())


@cli.group()
def topics() -> None:
    """embedq's topics."""


@topics.command()
@click.option("--partitions", type=click.IntRange(1), default=DEFAULT_PARTITIONS, show_default=True)
@click.option(
    "--reply-partitions", type=click.IntRange(1), default=DEFAULT_REPLY_PARTITIONS, show_default=True
)
@click.option("--replication", type=click.IntRange(1), help="Copies; absent: 3, or one for each broker.")
@connected
def create(
    partitions: int, reply_partitions: int, replication: int | None, servers: str, prefix: str, **options: Any
) -> None:
    """Create the topics that are missing. Changes none that exists."""
    security = _security(options)

    async def work() -> int:
        reports = await create_topics(
            servers,
            prefix=prefix,
            partitions=partitions,
            reply_partitions=reply_partitions,
            replication=replication,
            connect_timeout=5.0,
            **security,
        )
        for report in reports:
            done = "created" if report.created else "exists"
            click.echo(f"{report.name}: {done}, {report.partitions} partitions")
            for difference in report.differences:
                _say(f"warning: {report.name} {difference}")
        return 0

    _run(work())


@cli.command()
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False), help="Also run one consumer that serves it."
)
@click.option("--topics/--no-topics", default=True, show_default=True, help="Create embedq's topics.")
@click.option("--brokers", type=click.IntRange(1, 5), default=1, show_default=True)
@click.option(
    "--consumer-log", type=click.Path(dir_okay=False, path_type=Path), help="Where its log lines go."
)
def dev(model: str | None, topics: bool, brokers: int, consumer_log: Path | None) -> None:
    """Run a real Kafka and Redis as processes, until Ctrl-C."""
    from embedq_sdk.dev.command import run

    sys.exit(run(model=model, topics=topics, brokers=brokers, consumer_log=consumer_log))
