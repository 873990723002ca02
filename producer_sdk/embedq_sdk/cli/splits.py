"""`embedq split`: jobs of one alias shared out among others, for an A/B test."""

from __future__ import annotations

from typing import Final

import click

from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import NO_ANSWER, run, say

_EXPECTED: Final = "expected ALIAS=WEIGHT, such as new=10"


def _shares(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        name, _, weight = value.rpartition("=")
        if not name or not weight.isdecimal():
            raise click.BadParameter(f"{_EXPECTED}, got {value!r}")
        found[name] = int(weight)
    return found


@click.command()
@click.argument("name", required=False)
@click.argument("shares", nargs=-1, metavar="[ALIAS=WEIGHT]...", callback=_shares)
@click.option("--end", is_flag=True, help="Share the jobs of NAME out no more: it is an unknown model then.")
@kafka_options
def split(name: str | None, shares: dict[str, int], end: bool, kafka: KafkaTarget) -> None:
    """Share jobs for the model NAME out among aliases, by weight and stably by the jobs' ids. Without a NAME: show all splits.

    NAME is none that replicas serve by themselves. Exit code 2: another split for it was written at the same time.
    """
    if name is not None and bool(shares) == end:
        raise click.UsageError("give ALIAS=WEIGHT for each share, or --end")

    async def work() -> int:
        from embedq_sdk.admin.control import LostRace
        from embedq_sdk.admin.splits import split_alias, splits_in_force

        more = {"topic_prefix": kafka.prefix, "connect_timeout": CONNECT_TIMEOUT_S, **kafka.security}
        if name is None:
            for alias, weights in (await splits_in_force(kafka.servers, **more)).items():
                click.echo(f"{alias}: {_shown(weights)}")
            return 0
        try:
            written = await split_alias(kafka.servers, name, shares, **more)
        except LostRace as error:
            say(str(error))
            return NO_ANSWER
        click.echo(f"{name} version {written.version}: {_shown(written.split)}")
        return 0

    run(work())


def _shown(weights: dict[str, int]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{alias} {weight / total:.1%}" for alias, weight in weights.items()) or "ended"
