"""`embedq embed`: texts from the command line, from standard input or from a file, and their vectors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import click

from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, run, say
from embedq_sdk.cli.standard_input import InputLines
from embedq_sdk.cli.text_sources import STANDARD_INPUT, Format, SourceText, count_lines, open_texts

if TYPE_CHECKING:
    from embedq_sdk.cli.vector_files import VectorWriter
    from embedq_sdk.client import EmbedClient
    from embedq_sdk.stream import Embedded
    from embedq_shared.messages import Chunking

_TIMEOUT_S: Final = {"interactive": 120.0, "bulk": 86_400.0}
"""A bulk job waits behind a backlog, which may be hours long; a person waits for two minutes at most."""


def job_options(
    *,
    dtypes: Sequence[str] = ("float32", "float16", "int8", "binary"),
    dtype_help: str = "What vectors are made of, on the way and in the target. Default: float32.",
    chunks: Sequence[str] = ("late", "mean"),
    pin_help: str = "where the alias has another one, the command ends, and goes on once it is back",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of what is asked of each vector; `job_arguments` makes of their values what the SDK takes."""
    kinds = {
        "late": "late: a vector for each span of a text, with its place",
        "mean": "mean: one vector for a text of any length, the mean over its windows",
    }
    options = (
        click.option("--model", help="The model's alias. Default: the service's own."),
        click.option(
            "--model-version",
            help=f"The version that must answer, sha256:…, such as that of stored vectors; {pin_help}.",
        ),
        click.option("--dimensions", type=int, help="Length of each vector. Default: the model's own."),
        click.option("--dtype", type=click.Choice(dtypes), help=dtype_help),
        click.option("--query", "input_type", flag_value="query", help="The texts are search queries."),
        click.option(
            "--document", "input_type", flag_value="document", help="The texts are documents to be found."
        ),
        click.option(
            "--instruction", help="The task that a query serves, for models that take instructions."
        ),
        click.option(
            "--truncate",
            type=click.Choice(["error", "start", "end"]),
            help="Where to cut a text that is too long for the model: its start or its end. Default: error, the text fails.",
        ),
        click.option(
            "--chunk",
            type=click.Choice(chunks),
            help=f"{'; '.join(kinds[chunk] for chunk in chunks)}.",
        ),
        click.option("--chunk-tokens", type=int, help="Tokens in each span or window."),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_AS_THEY_ARE: Final = (
    "model",
    "model_version",
    "dimensions",
    "dtype",
    "input_type",
    "instruction",
    "truncate",
)
"""Options that the SDK calls by the same names."""


def job_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `job_options` out of a command's arguments: what is asked of each vector, as the SDK takes it."""
    from embedq_sdk.errors import InvalidArgument

    job = {name: given.pop(name) for name in _AS_THEY_ARE}
    mode, tokens = given.pop("chunk"), given.pop("chunk_tokens")
    if mode is None and tokens is not None:
        raise click.UsageError("--chunk-tokens is for --chunk")
    try:
        job["chunk"] = _chunking(mode, tokens)
    except InvalidArgument as error:
        raise click.BadParameter(str(error), param_hint="--chunk-tokens") from None
    return job


@click.command()
@click.argument("texts", nargs=-1)
@click.option(
    "--file",
    "source",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="A file with a text on each line, or .jsonl, .csv or .tsv with `text` and perhaps `id`; - is standard input.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(get_args(Format)),
    help="How to read the texts. Default: as the file's name ends; lines for other names and standard input.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write, .jsonl or .npy, which is NAME.part until it is complete. Default: JSON lines on standard output.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of --out, and the part that a run left.")
@job_options(
    dtype_help="How vectors are sent; all but binary are written as float32. Default: float32.",
    pin_help="where the alias has another one, texts fail",
)
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
    "--timeout", type=float, help="Seconds that each job may take. Default: 120, and a day in the bulk lane."
)
@click.option("--with-text", is_flag=True, help="Repeat each text in its JSON line.")
@kafka_options
def embed(
    texts: tuple[str, ...],
    source: str | None,
    format: Format | None,
    out: Path | None,
    force: bool,
    with_text: bool,
    timeout: float | None,
    kafka: KafkaTarget,
    **job: Any,
) -> None:
    """Embed TEXTS, the texts of a file, or with - those of standard input.

    For tables, vector stores, and runs that go on where they were: embedq run.
    """
    if texts == (STANDARD_INPUT,) and source is None:
        texts, source = (), STANDARD_INPUT
    if bool(texts) == bool(source):
        raise click.UsageError("give either TEXTS or --file; - is standard input")
    if format is not None and source is None:
        raise click.UsageError("--format is for --file, or for - as standard input")
    if out is not None and out.suffix not in (".jsonl", ".npy"):
        raise click.BadParameter("expected a name that ends with .jsonl or .npy", param_hint="--out")
    if job["chunk"] == "late" and out is not None and out.suffix == ".npy":
        raise click.BadParameter("spans need a .jsonl file, which says where each begins", param_hint="--out")
    job |= job_arguments(job)
    job["timeout"] = _TIMEOUT_S[job["lane"]] if timeout is None else timeout

    async def work() -> int:
        with contextlib.ExitStack() as stack:
            typed = InputLines(0) if source == STANDARD_INPUT else None
            found, total = _source(stack, texts, source, format, typed)
            client = await _connected(kafka)
            try:
                writer = stack.enter_context(_kept(_writer(out, with_text, force=force)))
                advance = stack.enter_context(_progress(total))
                ids: dict[int, str | int] = {}
                noted = _noted(found, ids)
                stream = client.stream(
                    noted if typed is None else _waited(noted, typed), errors="return", **job
                )
                return await _write_all(stream, ids, writer, advance)
            finally:
                await client.close()

    run(work())


def _chunking(mode: str | None, tokens: int | None) -> Chunking | None:
    from embedq_sdk.job_options import late, mean

    if mode == "late":
        return late() if tokens is None else late(tokens)
    return mean(tokens) if mode == "mean" else None


async def _connected(kafka: KafkaTarget) -> EmbedClient:
    """Opened here, before any file is opened, so that a run without Kafka leaves no empty output."""
    from embedq_sdk.client import EmbedClient

    client = EmbedClient(
        kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
    )
    return await client.open()


async def _write_all(
    stream: AsyncGenerator[Embedded, None],
    ids: dict[int, str | int],
    writer: VectorWriter,
    advance: Callable[[], None],
) -> int:
    """Write all vectors, each with its text's id, if there is one; the exit code."""
    from embedq_sdk.errors import KafkaUnavailable

    failed, last = 0, -1
    async with contextlib.aclosing(stream) as items:
        async for item in items:
            if item.index != last:
                ids.pop(last, None)
            writer.write(item, ids.get(item.index))
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


def _noted(found: Iterable[SourceText], ids: dict[int, str | int]) -> Iterator[str]:
    """The texts alone, whose ids go into `ids`, by index, until their vectors are written."""
    for index, one in enumerate(found):
        if one.id is not None:
            ids[index] = one.id
        yield one.text


async def _waited(texts: Iterator[str], typed: InputLines) -> AsyncIterator[str]:
    """The texts of standard input. Nothing else waits while none is there: vectors are written, and Kafka is heard."""
    while True:
        await typed.ready()
        if (text := next(texts, None)) is None:
            return
        yield text


def _source(
    stack: contextlib.ExitStack,
    texts: tuple[str, ...],
    source: str | None,
    format: Format | None,
    typed: InputLines | None,
) -> tuple[Iterator[SourceText], int | None]:
    """The texts, and how many they are at most, if that is known."""
    if source is None:
        return map(SourceText, texts), len(texts)
    found = stack.enter_context(open_texts(source, format, typed or sys.stdin.buffer))
    return found, None if typed is not None else count_lines(source)


def _writer(out: Path | None, with_text: bool, *, force: bool) -> VectorWriter:
    from embedq_sdk.cli.vector_files import JsonLines, NpyFile

    if out is not None and out.suffix == ".npy":
        return NpyFile(out, force=force)
    return JsonLines(out, sys.stdout.buffer, with_text=with_text, force=force)


@contextlib.contextmanager
def _kept(writer: VectorWriter) -> Iterator[VectorWriter]:
    """The writer, opened. Of a run that ends before its time, Ctrl-C included, it is said how far it came."""
    try:
        with writer:
            yield writer
    finally:
        if writer.left is not None:
            say(f"{writer.left.texts:,} texts are in {writer.left.path}")


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda: bar.advance(task)
