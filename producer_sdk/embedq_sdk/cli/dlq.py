"""`embedq dlq`: list, show, replay and drop dead letters."""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, get_args

import click
import msgspec

from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import FAILED, run, say
from embedq_shared.messages import ErrorCode

if TYPE_CHECKING:
    from embedq_sdk.admin.dead_letter_box import DeadLetterBox, LetterContent
    from embedq_sdk.admin.dead_letters import DeadLetter, LetterFilter, Position

_AGO: Final = re.compile(r"(\d+)([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_POSITION: Final = re.compile(r"(\d{1,9}):(\d{1,18})")
_SHOWN_BYTES: Final = 4096
_SHOWN_FAILURES: Final = 20


def moment(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Epoch milliseconds, from `2h` (ago) or an ISO date."""
    if value is None:
        return None
    if (ago := _AGO.fullmatch(value)) is not None:
        return int((time.time() - int(ago[1]) * _UNITS[ago[2]]) * 1000)
    try:
        return int(datetime.datetime.fromisoformat(value).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            "expected a time such as 2026-05-01T12:00, with an offset or in local time, or 30m, 2h or 7d (ago)",
            ctx=ctx,
            param=param,
        ) from None


def _position(ctx: click.Context, param: click.Parameter, value: str) -> Position:
    """A position on the dead-letter topic."""
    if (found := _POSITION.fullmatch(value)) is None:
        raise click.BadParameter(
            "expected PARTITION:OFFSET, as `embedq dlq list` shows it", ctx=ctx, param=param
        )
    from embedq_sdk.admin.dead_letters import Position

    return Position(int(found[1]), int(found[2]))


def _positions(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Position, ...]:
    return tuple(_position(ctx, param, value) for value in values)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that choose letters, and their value as its argument `where`, a `LetterFilter`."""

    @functools.wraps(command)
    def with_filter(
        *args: Any,
        codes: tuple[str, ...],
        topics: tuple[str, ...],
        ids: tuple[str, ...],
        reply_topics: tuple[str, ...],
        positions: tuple[Position, ...],
        since: int | None,
        until: int | None,
        **rest: Any,
    ) -> Any:
        from embedq_sdk.admin.dead_letters import LetterFilter

        where = LetterFilter(
            codes=codes,
            topics=topics,
            ids=ids,
            reply_topics=reply_topics,
            positions=positions,
            since_ms=since,
            until_ms=until,
        )
        return command(*args, where=where, **rest)

    for option in reversed(_FILTERS):
        with_filter = option(with_filter)
    return with_filter


_FILTERS: Final = (
    click.option(
        "--code",
        "codes",
        multiple=True,
        help=f"Letters with this error code: {', '.join(get_args(ErrorCode))}. Any option here may be repeated.",
    ),
    click.option("--topic", "topics", multiple=True, help="Letters that came from this job topic."),
    click.option("--id", "ids", multiple=True, help="Letters of the job with this id."),
    click.option(
        "--reply-topic", "reply_topics", multiple=True, help="Letters of jobs that named this reply topic."
    ),
    click.option(
        "--at",
        "positions",
        multiple=True,
        callback=_positions,
        metavar="PARTITION:OFFSET",
        help="The letter at this position.",
    ),
    click.option(
        "--since",
        callback=moment,
        metavar="TIME",
        help="Letters of jobs that were written at this time or later: 2026-05-01T12:00, or 2h for two hours ago.",
    ),
    click.option(
        "--until", callback=moment, metavar="TIME", help="Letters of jobs that were written before this time."
    ),
)


@click.group()
def dlq() -> None:
    """Look at dead letters, send them again, or drop them."""


@dlq.command("list")
@filter_options
@click.option("--all", "settled", is_flag=True, help="Also letters that were replayed or dropped.")
@click.option("--limit", type=click.IntRange(1), help="Show at most this many, the newest of each partition.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each letter, on a line.")
@kafka_options
def list_letters(
    where: LetterFilter, settled: bool, limit: int | None, as_json: bool, kafka: KafkaTarget
) -> None:
    """List dead letters, by partition and offset."""

    async def work() -> int:
        async with _box(kafka) as box:
            found = await box.find(where, settled=settled)
        shown = found if limit is None else sorted(found, key=_age)[:limit]
        for line in _lines(shown, as_json=as_json):
            click.echo(line)
        if not as_json:
            say(f"{len(found)} dead letters" + (f", {len(shown)} shown" if len(shown) < len(found) else ""))
        return 0

    run(work())


@dlq.command()
@click.argument("position", callback=_position)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; key and value are base64.")
@click.option("--value", "raw", is_flag=True, help="Print the record's value alone, byte for byte.")
@kafka_options
def show(position: Position, as_json: bool, raw: bool, kafka: KafkaTarget) -> None:
    """Show the dead letter at POSITION, a partition and an offset such as 3:42."""

    async def work() -> int:
        async with _box(kafka) as box:
            found = await box.read(position)
        if raw:
            click.echo(found.value or b"", nl=False)
        elif as_json:
            click.echo(msgspec.json.encode(found))
        else:
            for line in _described(found):
                click.echo(line)
        return 0

    run(work())


@dlq.command()
@filter_options
@click.option("--everything", is_flag=True, help="All letters; needed where no other option chooses some.")
@click.option(
    "--rate",
    type=click.FloatRange(0.1),
    default=100.0,
    show_default=True,
    help="Jobs a second at most.",
)
@click.option(
    "--without-deadline", is_flag=True, help="Leave out the jobs' deadlines, which have most likely passed."
)
@click.option("--dry-run", is_flag=True, help="Say how many would be sent, and send none.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@kafka_options
def replay(
    where: LetterFilter,
    everything: bool,
    rate: float,
    without_deadline: bool,
    dry_run: bool,
    as_json: bool,
    kafka: KafkaTarget,
) -> None:
    """Send the jobs of dead letters again: to the topic they came from, with their ids, keys and headers.

    A letter that was sent is settled, and no longer listed. Interrupted, the same command goes on where it was.
    Exit code 1: some could not be sent; they are named.
    """
    from embedq_sdk.admin.dead_letter_box import ReplayProgress

    _check_choice(where, everything)

    async def work() -> int:
        async with _box(kafka) as box:
            found = await box.find(where)
            last = ReplayProgress(total=len(found), replayed=0, failed=[])
            if not dry_run:
                with _progress("replaying", len(found)) as advance:
                    replaying = box.replay(found, rate=rate, keep_deadline=not without_deadline)
                    async with contextlib.aclosing(replaying) as updates:
                        async for update in updates:
                            advance(update.replayed + len(update.failed))
                            last = update
        if as_json:
            failed = [{"position": str(position), "reason": why} for position, why in last.failed]
            click.echo(
                msgspec.json.encode(
                    {"total": last.total, "replayed": last.replayed, "failed": failed, "dry_run": dry_run}
                )
            )
        else:
            click.echo(
                f"{last.replayed} of {last.total} replayed"
                if not dry_run
                else f"{last.total} would be replayed"
            )
            for position, why in last.failed[:_SHOWN_FAILURES]:
                say(f"{position} not replayed: {why}")
            if len(last.failed) > _SHOWN_FAILURES:
                say(f"and {len(last.failed) - _SHOWN_FAILURES} more")
        return FAILED if last.failed else 0

    run(work())


@dlq.command()
@filter_options
@click.option("--everything", is_flag=True, help="All letters; needed where no other option chooses some.")
@click.option("--dry-run", is_flag=True, help="Say how many would be dropped, and drop none.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@kafka_options
def drop(
    where: LetterFilter, everything: bool, dry_run: bool, yes: bool, as_json: bool, kafka: KafkaTarget
) -> None:
    """Settle dead letters without sending them again.

    They are no longer listed nor replayed. Kafka deletes from the beginning of a partition only, so their records go once
    all letters before them are settled, too.
    """
    _check_choice(where, everything)

    async def work() -> int:
        async with _box(kafka) as box:
            found = await box.find(where)
            if dry_run:
                click.echo(
                    msgspec.json.encode({"dropped": 0, "would_drop": len(found), "freed": 0, "refused": None})
                    if as_json
                    else f"{len(found)} would be dropped"
                )
                return 0
            if not yes and not click.confirm(f"Drop {len(found)} dead letters for good?", err=True):
                return FAILED
            report = await box.drop(found)
        if as_json:
            click.echo(msgspec.json.encode(report))
        else:
            click.echo(f"{report.dropped} dropped, {report.freed} records deleted")
            if report.refused is not None:
                say(f"dropped letters stay on the topic, since Kafka deleted none: {report.refused}")
        return 0

    run(work())


def _check_choice(where: LetterFilter, everything: bool) -> None:
    if where.is_empty != everything:
        raise click.UsageError(
            "choose letters with --code, --topic, --id, --reply-topic, --at, --since or --until; or --everything"
            if where.is_empty
            else "--everything chooses all letters: leave out the options that choose some"
        )


@contextlib.asynccontextmanager
async def _box(kafka: KafkaTarget) -> AsyncIterator[DeadLetterBox]:
    from embedq_sdk.admin.dead_letter_box import dead_letters

    async with dead_letters(
        kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
    ) as box:
        yield box


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


# -- showing ------------------------------------------------------------------------------------------------------------


def _age(letter: DeadLetter) -> tuple[int, int]:
    return -letter.offset, letter.partition


def _lines(letters: list[DeadLetter], *, as_json: bool) -> Iterator[Any]:
    if as_json:
        for letter in letters:
            yield msgspec.json.encode(letter)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if console.is_terminal and letters:
        table = Table()
        for column in ("position", "written", "code", "attempts", "from", "id", "message"):
            table.add_column(column)
        for letter in letters:
            table.add_row(*map(escape, _row(letter)))
        with console.capture() as capture:
            console.print(table)
        yield capture.get().rstrip("\n")
        return
    for letter in letters:
        yield "\t".join(_row(letter))


def _row(letter: DeadLetter) -> tuple[str, ...]:
    return (
        str(letter.position),
        _when(letter.original_timestamp),
        letter.error_code + (f" ({letter.settled})" if letter.settled else ""),
        "-" if letter.attempts is None else str(letter.attempts),
        _origin(letter),
        "-" if letter.id is None else letter.id,
        letter.error_message,
    )


def _origin(letter: DeadLetter) -> str:
    return f"{letter.original_topic}-{letter.original_partition}-{letter.original_offset}"


def _when(ms: int | None) -> str:
    if ms is None or ms < 0:
        return "-"
    try:
        found = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "-"
    return found.isoformat(timespec="seconds").replace("+00:00", "Z")


def _described(found: LetterContent) -> Iterator[str]:
    letter = found.letter
    facts = {
        "position": str(letter.position),
        "settled": letter.settled or "no",
        "error": f"{letter.error_code}: {letter.error_message}",
        "from": _origin(letter),
        "written": _when(letter.original_timestamp),
        "first seen": _when(letter.first_seen),
        "attempts": str(letter.attempts or "-"),
        "history": ", ".join(f"{_when(death.at)} on {death.replica}" for death in letter.history) or "-",
        "runs before": ", ".join(f"{_when(run.at)} {run.code} on {run.replica}" for run in letter.retries)
        or "-",
        "replica": letter.replica or "-",
        "model": letter.model_version or "-",
        "result sent": {None: "-", True: "yes", False: "no"}[letter.result_sent],
        "reply topic": letter.reply_topic or "-",
        "id": letter.id or "-",
        "key": "-" if found.key is None else ascii(found.key)[2:-1],
    }
    for name, fact in facts.items():
        yield f"{name + ':':<13}{fact}"
    for name, value in found.headers:
        yield f"{'header:':<13}{name}: {ascii(value)[2:-1]}"
    if found.value is None:
        yield f"{'value:':<13}none"
        return
    text = found.value[:_SHOWN_BYTES].decode(errors="backslashreplace")
    more = len(found.value) - _SHOWN_BYTES
    yield f"{'value:':<13}{len(found.value)} bytes"
    yield text + (f"… and {more} bytes more (--value)" if more > 0 else "")
