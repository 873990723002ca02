"""The main job on real input: start what it needs, embed, search, ask over HTTP, repeat from the cache, reload under load, stop.

Ends with a summary and exit code 0, or with a clear message and another code; leaves no process and no file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from demo import models
from demo.acts import (
    DemoFailed,
    OverHttp,
    Pass,
    Reloaded,
    check_versions,
    embed_all,
    nearest,
    over_http,
    reload_under_load,
)
from demo.models import ModelMissing
from demo.servers import ServerFailed, start_gateway, start_replica
from embedq_sdk import EmbedClient, EmbedError
from embedq_sdk.admin.topics import create_topics, wanted_topics
from embedq_sdk.dev import DevStack, DevStackError
from embedq_sdk.dev.processes import Processes

HERE: Final = Path(__file__).parent
NEIGHBOURS: Final = 3
# What a user can mend, or must know: said in a few lines, without a traceback.
EXPECTED: Final = (DemoFailed, ServerFailed, ModelMissing, DevStackError, EmbedError)

console = Console(highlight=False)


def main() -> int:
    """The exit code: 0 if all that the demo promises happened, 1 if not, 130 after Ctrl-C."""
    # A failed connection is a log line of aiokafka's; the error that follows says it in one.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    logging.getLogger("aiokafka").propagate = False
    code = 0
    try:
        with Processes() as processes:
            _run(processes)
    except* EXPECTED as failed:
        code = 1
        for error in _leaves(failed):
            console.print(f"demo failed: {error}", style="red", markup=False, soft_wrap=True)
    except* KeyboardInterrupt:
        code = 130
        console.print("interrupted; everything that was started is stopped")
    return code


def _run(processes: Processes) -> None:
    started = time.perf_counter()
    roots = processes.directory / "models"  # so that they go when the processes go, whatever ends us
    models.prepare(roots)
    stack = DevStack(report=lambda line: console.print(f"  {line}", style="dim", markup=False))
    with stack:
        fact("broker", stack.kafka_description, started)
        fact("cache", stack.redis_description, started)
        first, http, second, reloaded = asyncio.run(_acts(stack, processes, roots))
        broker, cache = stack.kafka_description, stack.redis_description
    _summary(
        first,
        http,
        second,
        reloaded,
        {"broker": broker, "cache": cache, "in all": f"{time.perf_counter() - started:.1f} s"},
    )


async def _acts(stack: DevStack, processes: Processes, roots: Path) -> tuple[Pass, OverHttp, Pass, Reloaded]:
    """Everything between a running broker and a stopped service."""
    sentences, queries = _lines("sentences.txt"), _lines("queries.txt")
    servers = stack.kafka_servers
    async with _topics(servers) as prefix:
        started = time.perf_counter()
        replica = start_replica(
            processes, servers=servers, redis_url=stack.redis_url, prefix=prefix, model=roots / models.FIRST
        )
        gateway = start_gateway(processes, servers=servers, prefix=prefix)  # meanwhile
        with console.status("starting one replica of the service, and a gateway"):
            await replica.ready()
            await gateway.ready()
        fact("service", "one replica with all-MiniLM-L6-v2", started)
        fact("gateway", gateway.url, started)

        async with EmbedClient(servers, topic_prefix=prefix) as client:
            with progress("embedding", len(sentences)) as tick:
                first = await embed_all(client, sentences, tick)
            _show(queries, sentences, await nearest(client, queries, first.vectors, NEIGHBOURS))
            http = await asyncio.to_thread(over_http, gateway.url, sentences[0], first)
            console.print(http.command, style="bold", markup=False, soft_wrap=True)
            console.print(f"  {http.answer}", markup=False)
            with progress("once more", len(sentences)) as tick:
                again = await embed_all(client, sentences, tick)
            with progress("reloading while jobs flow", None) as tick:
                reloaded = await reload_under_load(client, sentences, servers, prefix, models.SECOND, tick)
            with progress("embedding with the new model", len(sentences)) as tick:
                other = await embed_all(client, sentences, tick)
        check_versions(reloaded, [first, other])

        with console.status("stopping the service"):
            await gateway.stop()
            await replica.stop()
    return first, http, again, reloaded


@asynccontextmanager
async def _topics(servers: str) -> AsyncIterator[str]:
    """Topics of this run alone: a given broker may serve others, whose models a reload must not touch."""
    prefix = f"embedq-demo-{uuid.uuid4().hex[:8]}"
    await create_topics(servers, prefix=prefix, partitions=4, reply_partitions=4)
    try:
        yield prefix
    finally:
        if os.environ.get("EMBEDQ_KAFKA_SERVERS"):
            names = [topic.name for topic in wanted_topics(prefix, partitions=1, reply_partitions=1)]
            admin = AIOKafkaAdminClient(bootstrap_servers=servers)
            await admin.start()
            try:
                await admin.delete_topics(names)
            finally:
                await admin.close()


# -- on the screen ----------------------------------------------------------------------------------------------------


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar that one call moves by one answer."""
    columns = (
        TextColumn(f"{what:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)
        if total is None:
            done = bars.tasks[0].completed
            bars.update(task, total=done)


def fact(name: str, what: str, since: float) -> None:
    """One line about what is there now."""
    console.print(f"{name:<9}{what}  [{time.perf_counter() - since:.1f} s]", markup=False)


def _show(queries: list[str], sentences: list[str], found: list[list[tuple[float, int]]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
    table.add_column(width=6, justify="right")
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for query, neighbours in zip(queries, found, strict=True):
        table.add_row("", Text(query, style="bold"))
        for cosine, index in neighbours:
            table.add_row(f"{cosine:.3f}", Text(sentences[index]))
    console.print(table)


def _summary(first: Pass, http: OverHttp, again: Pass, reloaded: Reloaded, around: Mapping[str, str]) -> None:
    count = len(first.vectors)
    jobs = reloaded.jobs_by_version()
    versions = ", ".join(f"{number} by {version[:15]}" for version, number in jobs.items())
    table = Table(show_header=False, title="What happened", title_justify="left", padding=(0, 1))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "broker": around["broker"],
        "cache": around["cache"],
        "first pass": f"{count} sentences, {first.tokens:,} tokens in {first.seconds:.2f} s "
        f"({count / first.seconds:,.0f}/s), {first.cached} from the cache",
        "over HTTP": f"a request as OpenAI's clients send it: the same vector to the last bit, in {http.seconds * 1000:.0f} ms",
        "second pass": f"{count} sentences in {again.seconds:.2f} s ({count / again.seconds:,.0f}/s), "
        f"{again.cached} from the cache",
        "reload": f"{' → '.join(reloaded.steps)} in {reloaded.seconds:.2f} s, while {reloaded.sent} jobs were sent",
        "came back": f"{len(reloaded.versions)} of {reloaded.sent} jobs: {versions}; "
        "each vector is the one of its version",
        "the end": "service and gateway stopped with exit code 0",
        "in all": around["in all"],
    }
    for name, what in rows.items():
        table.add_row(name, Text(what))
    console.print(table)


def _lines(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
