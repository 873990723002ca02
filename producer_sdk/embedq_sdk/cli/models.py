"""The commands that change what replicas serve, and that show it: `reload`, `rollback`, `split`, `models`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, get_args

import click

from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, MIXED, NO_ANSWER, run, say
from embedq_shared.messages import MAX_SOAK_S, SAME_SPACE_COSINE, Policy, Quantization

if TYPE_CHECKING:
    from embedq_sdk.admin.rollout import RolloutUpdate

_ALL: Final = "all"
_SHARE_EXPECTED: Final = "expected ALIAS=WEIGHT, such as new=10"
_POLICIES: Final[dict[str, Policy | None]] = {
    "auto": None,
    "availability": "availability_preserving",
    "resource": "resource_preserving",
}


def _wave(ctx: click.Context, param: click.Parameter, value: str) -> int | str | None:
    """A number of replicas, a percentage of them, or all (None)."""
    if value == _ALL:
        return None
    if value.isdecimal() and int(value) >= 1:
        return int(value)
    if value.endswith("%") and value[:-1].isdecimal() and 1 <= int(value[:-1]) <= 100:
        return value
    raise click.BadParameter(f"expected a number of replicas, a percentage of them, or {_ALL}, got {value!r}")


_alias = click.option(
    "--alias", default="default", show_default=True, help="The alias whose model is changed."
)
_max_unavailable = click.option(
    "--max-unavailable",
    callback=_wave,
    default="25%",
    show_default=True,
    metavar="N|N%|all",
    help="How many replicas change at once, at least one.",
)
_timeout = click.option(
    "--timeout",
    type=float,
    default=600.0,
    show_default=True,
    help="Seconds to wait for all replicas, a soak time apart.",
)
_wait = click.option(
    "--wait/--no-wait",
    default=True,
    show_default=True,
    help="Wait for all replicas. They follow the command either way.",
)


@click.command()
@click.argument("path")
@_alias
@click.option("--digest", help="The model version that must result, sha256:…; replicas refuse any other.")
@click.option(
    "--policy",
    type=click.Choice(["auto", "availability", "resource"]),
    default="auto",
    show_default=True,
    help="Load the new model alongside the old one, or after unloading it; auto: as each replica's free memory allows.",
)
@click.option(
    "--quantization",
    type=click.Choice(get_args(Quantization)),
    help="Of this model. Default: the replicas' setting.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="Least cosine similarity of the new model's check vectors to the old model's. Default: not checked.",
)
@click.option(
    "--same-space", is_flag=True, help="The same as --min-cosine 0.995: nothing but precision may differ."
)
@click.option(
    "--golden",
    metavar="FILE",
    help="Texts and expected vectors, below the model root. Default: embedq_golden.json in the model's directory, if it is there.",
)
@click.option(
    "--golden-min-cosine",
    type=click.FloatRange(-1, 1),
    help="Least cosine similarity to the expected vectors. Default: 0.995.",
)
@click.option(
    "--min-dimensions",
    type=click.IntRange(1),
    help="Least length of the model's vectors. Default: what jobs lately asked for.",
)
@click.option(
    "--expect-version",
    type=click.IntRange(0),
    help="The command that must be in force, 0 for none; else nothing is written. Default: whichever.",
)
@click.option(
    "--pool",
    help="Where the alias shall live, `default` for the pool without a name: jobs go there from now on. Default: where it lives now.",
)
@_max_unavailable
@click.option(
    "--canary/--no-canary",
    default=True,
    show_default=True,
    help="One replica changes alone first. With --no-canary and --max-unavailable all each replica follows for itself, and "
    "nothing is taken back.",
)
@click.option(
    "--soak",
    type=click.FloatRange(0, MAX_SOAK_S),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the canary must serve before others follow. If a text gets no vector meanwhile, or the canary dies, it goes back.",
)
@_wait
@_timeout
@kafka_options
def reload(
    path: str,
    alias: str,
    policy: str,
    same_space: bool,
    min_cosine: float | None,
    expect_version: int | None,
    wait: bool,
    timeout: float,
    kafka: KafkaTarget,
    **rest: Any,
) -> None:
    """Make every replica load the model at PATH, a directory below the service's model root.

    One replica changes first, then the others in waves. If one fails, or dies, all go back to the model of before. They do so by
    themselves: Ctrl-C here stops nothing.

    Exit code 0: every live replica is READY. 1: it failed, and all serve the old model. 2: there is no live replica, time ran
    out, or a later command took its place. 4: it failed, and replicas serve different models.
    """
    from embedq_sdk.admin.control import reload_model

    updates = reload_model(
        kafka.servers,
        path,
        alias=alias,
        policy=_POLICIES[policy],
        min_cosine=SAME_SPACE_COSINE if same_space and min_cosine is None else min_cosine,
        expected_version=expect_version,
        timeout=timeout,
        **rest,
        topic_prefix=kafka.prefix,
        connect_timeout=CONNECT_TIMEOUT_S,
        **kafka.security,
    )
    run(_follow(updates, timeout, wait=wait))


@click.command()
@_alias
@_max_unavailable
@_wait
@_timeout
@kafka_options
def rollback(
    alias: str, max_unavailable: int | str | None, wait: bool, timeout: float, kafka: KafkaTarget
) -> None:
    """Bring back the model that the alias had before its present one, in waves.

    A second time brings the present one back again. Exit codes: those of `embedq reload`, and 2 if nothing is known to go back to.
    """
    from embedq_sdk.admin.control import rollback_model

    updates = rollback_model(
        kafka.servers,
        alias=alias,
        max_unavailable=max_unavailable,
        timeout=timeout,
        topic_prefix=kafka.prefix,
        connect_timeout=CONNECT_TIMEOUT_S,
        **kafka.security,
    )
    run(_follow(updates, timeout, wait=wait))


async def _follow(updates: AsyncGenerator[RolloutUpdate, None], timeout: float, *, wait: bool) -> int:
    """Show how the replicas follow a command; the exit code."""
    from rich.console import Console
    from rich.live import Live

    from embedq_sdk.admin.commands import NothingBefore, UnexpectedVersion
    from embedq_sdk.admin.control import LostRace
    from embedq_sdk.cli.tables import replica_lines, rollout_table

    console = Console()
    last: RolloutUpdate | None = None
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console)) if console.is_terminal and wait else None
        try:
            async with contextlib.aclosing(updates) as reported:
                async for update in reported:
                    if not wait:
                        click.echo(f"{update.alias} version {update.version} is written")
                        return 0
                    if live is not None:
                        live.update(rollout_table(update))
                    else:
                        for line in replica_lines(last, update):
                            click.echo(line)
                    last = update
        except (LostRace, NothingBefore, UnexpectedVersion) as error:
            say(str(error))
            return NO_ANSWER
    if last is None:
        raise RuntimeError("a reload ended without an update. This is a bug.")
    return _conclude(last, timeout)


def _conclude(last: RolloutUpdate, timeout: float) -> int:
    """Report how a reload ended; the exit code."""
    count = len(last.replicas)
    name = f"{last.alias} version {last.version}"
    match last.progress:
        case "ready":
            click.echo(f"{name}: READY on {count} of {count} replicas")
            return 0
        case "rolled_back":
            say(f"{name} failed: {last.reason}")
            say(
                f"version {last.rollback_version} has brought the old model back on {count} of {count} replicas"
            )
            return MIXED if last.mixed else FAILED
        case "failed":
            if last.reason is not None:
                say(f"{name} failed: {last.reason}")
            for replica in last.replicas:
                if replica.outcome == "FAILED":
                    say(f"{replica.replica} FAILED and keeps its old model: {replica.error}")
            return MIXED if last.mixed else FAILED
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@kafka_options
def models(as_json: bool, kafka: KafkaTarget) -> None:
    """Show what each live replica serves: directory, version, sizes, memory, and the step of its last command."""
    import msgspec
    from rich.console import Console

    from embedq_sdk.admin.control import live_replicas
    from embedq_sdk.cli.tables import model_lines

    async def show() -> int:
        replicas = await live_replicas(
            kafka.servers,
            topic_prefix=kafka.prefix,
            connect_timeout=CONNECT_TIMEOUT_S,
            **kafka.security,
        )
        if as_json:
            click.echo(msgspec.json.encode(replicas))
            return 0
        console = Console()
        for renderable in model_lines(replicas, plain=not console.is_terminal):
            console.print(renderable, soft_wrap=True)
        return 0

    run(show())


def _shares(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        name, _, weight = value.rpartition("=")
        if not name or not weight.isdecimal():
            raise click.BadParameter(f"{_SHARE_EXPECTED}, got {value!r}")
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
                click.echo(f"{alias}: {_shown_shares(weights)}")
            return 0
        try:
            written = await split_alias(kafka.servers, name, shares, **more)
        except LostRace as error:
            say(str(error))
            return NO_ANSWER
        click.echo(f"{name} version {written.version}: {_shown_shares(written.split)}")
        return 0

    run(work())


def _shown_shares(weights: dict[str, int]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{alias} {weight / total:.1%}" for alias, weight in weights.items()) or "ended"
