"""`embedq verify MODEL --against MODEL`: what changes when one model, dtype or device replaces another.

A plug-in of the command line (entry point `embedq.commands`), whose help needs this file: so it imports what compares only
when there is something to compare. Nothing is written anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from embedq_consumer.engine import Quantization

__all__ = ["verify"]

MISSED = 1
"""A threshold is missed, or a text has no vector."""
NOT_RUN = 2
"""A model or the texts cannot be used."""


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--texts",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One text per line, or .jsonl with `text` in each object (default: a few hundred built-in texts).",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--against-device", help="Default: same as --device.")
@click.option("--quantization", type=click.Choice(get_args(Quantization)), default="none", show_default=True)
@click.option(
    "--against-quantization", type=click.Choice(get_args(Quantization)), default="none", show_default=True
)
@click.option("--keep-bf16", default="", help="Layers that FP8 leaves in bf16, such as 0,1,-1.")
@click.option("--against-keep-bf16", default="", help="The same for --against.")
@click.option("--dimensions", type=click.IntRange(1), help="Cut the vectors to this many components.")
@click.option(
    "--top-k",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Nearest neighbors of each text to compare.",
)
@click.option(
    "--input-type", type=click.Choice(["query", "document"]), help="Prepend the model's prompt for this type."
)
@click.option("--instruction", help="Prepend this instruction.")
@click.option("--threads", type=click.IntRange(1), help="PyTorch CPU threads (default: all cores).")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    default=0.99,
    show_default=True,
    help="Report the share of texts whose cosine is below this.",
)
@click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Exit with 1 if any text's cosine is lower.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Exit with 1 if the mean neighbor agreement is lower.",
)
@click.option(
    "--worst",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Number of least similar texts to show.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    model: Path,
    against: Path,
    source: Path | None,
    device: str,
    against_device: str | None,
    quantization: Quantization,
    against_quantization: Quantization,
    keep_bf16: str,
    against_keep_bf16: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare MODEL's vectors with another model's, or with its own in another dtype or on another device.

    Exits with 1 if --min-cosine or --min-agreement is not met or a text has no vector, and with 2 if a model
    cannot be loaded or run.
    """
    from embedq_consumer.engine import DeviceLost, ModelError, OutOfMemory
    from embedq_consumer.verify.comparison import Asked, Setup, Unusable, compare, layers, lines_of, tables

    asked = Asked(**options)
    try:
        sides = (
            Setup(path=model, device=device, quantization=quantization, keep_bf16=layers(keep_bf16)),
            Setup(
                path=against,
                device=against_device or device,
                quantization=against_quantization,
                keep_bf16=layers(against_keep_bf16),
            ),
        )
        lines = list(lines_of(source))
        report = compare(lines, sides, asked)
    except (ModelError, OutOfMemory, DeviceLost, Unusable) as error:
        _say(str(error))
        sys.exit(NOT_RUN)
    except ModuleNotFoundError as missing:
        _say(f"verify needs {missing.name}: pip install 'embedq[consumer]'")
        sys.exit(NOT_RUN)
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        from rich.console import Console

        for table in tables(report):
            Console().print(table)
    for miss in report.missed:
        _say(miss)
    sys.exit(MISSED if report.missed else 0)


def _say(line: str) -> None:
    click.echo(f"embedq: {line}", err=True)
