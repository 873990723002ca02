"""`embedq golden write` and `check`: the vectors of a model directory, or of the model that serves, kept in a file or compared with one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import click

from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, optional_kafka_options
from embedq_sdk.cli.running import FAILED, run, say
from embedq_sdk.cli.text_sources import BadSource, open_texts
from embedq_shared.messages import DEFAULT_ALIAS, GOLDEN_FILE, InputType, Quantization

if TYPE_CHECKING:
    from embedq_sdk.cli.golden.sources import Source

_TIMEOUT_S: Final = 120.0

_from = click.option(
    "--from",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model directory, loaded here. Default: the model that serves, asked over Kafka.",
)
_alias = click.option(
    "--alias", default=DEFAULT_ALIAS, show_default=True, help="The alias of the model that serves."
)
_device = click.option(
    "--device", default="auto", show_default=True, help="With --from: auto, cpu, cuda or cuda:N."
)
_quantization = click.option(
    "--quantization",
    type=click.Choice(get_args(Quantization)),
    default="none",
    show_default=True,
    help="With --from.",
)


@click.group()
def golden() -> None:
    """Texts and the vectors that a model must give for them, which each reload checks."""


@golden.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The file to write. Default: {GOLDEN_FILE} in the directory of --from, where a reload looks for it.",
)
@click.option(
    "--texts",
    type=click.Path(dir_okay=False, exists=True),
    help="A text on each line, or .jsonl, .csv or .tsv with `text`; 256 at most. Default: eighteen built-in ones.",
)
@click.option("--query", "input_type", flag_value="query", help="The texts are search queries.")
@click.option("--document", "input_type", flag_value="document", help="The texts are documents to be found.")
@click.option(
    "--dimensions", type=click.IntRange(1), help="Keep this many numbers of each vector. Default: all."
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="What a model must reach, kept in the file. Default: 0.995, which another precision of the same model does.",
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_from
@_alias
@_device
@_quantization
@optional_kafka_options
def write(
    out: Path | None,
    texts: str | None,
    input_type: InputType | None,
    dimensions: int | None,
    min_cosine: float | None,
    force: bool,
    directory: Path | None,
    alias: str,
    device: str,
    quantization: str,
    kafka: KafkaTarget | None,
) -> None:
    """Write a file of texts and their vectors, of a model that is known to be good.

    Exit code 0: it is written. 1: a text has no vector. 2: wrong usage, or the model cannot be used. 3: no Kafka.
    """
    if out is None:
        if directory is None:
            raise click.UsageError(
                "--out: expected the file to write, or --from, whose directory it belongs into"
            )
        out = directory / GOLDEN_FILE
    if out.exists() and not force:
        raise click.BadParameter(f"{out} exists; --force overwrites it", param_hint="--out")
    source = _source(directory, alias, device, quantization, kafka)
    target = out

    async def work() -> int:
        import asyncio
        from functools import partial

        from embedq_sdk.cli.golden.files import written
        from embedq_sdk.cli.golden.sources import Asked

        asked = [Asked(text, input_type) for text in await asyncio.to_thread(_texts, texts)]
        vectors, version = await source.vectors(asked)
        write_it = partial(written, target, asked, vectors, version)
        count = await asyncio.to_thread(write_it, dimensions=dimensions, min_cosine=min_cosine)
        click.echo(f"{target}: {len(asked)} texts, {count} numbers each, of {version}")
        return 0

    run(work())


@golden.command()
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="What each vector must reach. Default: what the file says, else 0.995.",
)
@_from
@_alias
@_device
@_quantization
@optional_kafka_options
def check(
    file: Path,
    min_cosine: float | None,
    directory: Path | None,
    alias: str,
    device: str,
    quantization: str,
    kafka: KafkaTarget | None,
) -> None:
    """Compare a model's vectors with those of FILE, as a reload does, but for all texts.

    Exit code 0: each is close enough. 1: one is not. 2: wrong usage, or the model or the file cannot be used. 3: no Kafka.
    """
    source = _source(directory, alias, device, quantization, kafka)

    async def work() -> int:
        import asyncio

        from embedq_sdk.cli.golden.files import compared, read
        from embedq_sdk.cli.golden.sources import Asked

        stored = await asyncio.to_thread(read, file)
        vectors, version = await source.vectors([Asked(each.text, each.input_type) for each in stored.texts])
        report = compared(stored, vectors, min_cosine)
        click.echo(f"{version}: {len(report.cosines)} texts, lowest cosine {min(report.cosines):.6f}")
        for number in report.missed:
            say(
                f"texts[{number}]: expected a cosine of at least {report.least:g} to the stored vector, "
                f"got {report.cosines[number]:.6f}: {stored.texts[number].text[:40]!r}"
            )
        return FAILED if report.missed else 0

    run(work())


def _source(
    directory: Path | None, alias: str, device: str, quantization: str, kafka: KafkaTarget | None
) -> Source:
    from embedq_sdk.cli.golden.sources import Directory, Serving

    if directory is not None:
        return Directory(directory, device, quantization)
    if kafka is None:
        raise click.UsageError(
            "expected --from, a model directory, or --servers (EMBEDQ_KAFKA_SERVERS), where a model serves"
        )
    return Serving(kafka, alias, CONNECT_TIMEOUT_S, _TIMEOUT_S)


def _texts(path: str | None) -> Sequence[str]:
    """The texts to store; empty ones are not."""
    from embedq_sdk.cli.golden.texts import BUILT_IN
    from embedq_shared.golden import MOST_TEXTS

    if path is None:
        return BUILT_IN
    with open_texts(path, None, sys.stdin.buffer) as found:
        texts = [each.text for each in found if each.text]
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise BadSource(f"{path}: expected 1 to {MOST_TEXTS} texts, got {len(texts):,}")
    return texts
