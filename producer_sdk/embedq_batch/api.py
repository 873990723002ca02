"""`embedq_batch.running.run`, and what the command line shares with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec

from embedq_batch.content.columns import Columns
from embedq_batch.running.options import RunOptions
from embedq_batch.running.progress import Progress
from embedq_batch.running.run import Parts, Summary, execute
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sinks.sink import Sink
from embedq_batch.sources.opening import opened_source
from embedq_batch.sources.source import Since, Source
from embedq_sdk.client import EmbedClient
from embedq_sdk.job_options import JobArguments, JobOptions


async def run(
    source: str | Sequence[str] | Source,
    sink: str | Sink,
    *,
    servers: str | list[str],
    topic_prefix: str = "embed",
    security: dict[str, Any] | None = None,
    columns: Columns | None = None,
    query: str | None = None,
    since: Since | None = None,
    options: RunOptions | None = None,
    manifest: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    **job: Unpack[JobArguments],
) -> Summary:
    """Embed the texts of a source into a target; what `embedq run` does. The same call goes on where an earlier one ended.

    `source` and `sink` are what the command takes after --from and --to, or objects of your own. `columns` say what of a
    row is its text; `job` what is asked of each vector, as in `EmbedClient`. `options` has all else; its `job` is replaced.
    `query` is for PostgreSQL, instead of a table; `since` for a Kafka topic: epoch milliseconds, or {partition: offset}.

    Raises:
        BadSource, BadTarget, OtherRun, RunBusy, ModelChanged, TooManyFailures, EmbedError.
    """
    job["lane"] = "bulk"
    columns = columns or Columns()
    if isinstance(source, (str, list, tuple)):
        source = await asyncio.to_thread(
            opened_source,
            [source] if isinstance(source, str) else source,
            columns,
            query=query,
            since=since,
            servers=servers,
            security=security,
            prefix=topic_prefix,
        )
    asked = msgspec.structs.replace(options or RunOptions(), job=JobOptions(**job), about=described(columns))
    async with EmbedClient(servers, topic_prefix=topic_prefix, **(security or {})) as client:
        return await execute(
            Parts(
                source=source,  # type: ignore[arg-type]  # a string was made a source above
                sink=await asyncio.to_thread(opened_sink, sink, servers=servers, security=security)
                if isinstance(sink, str)
                else sink,
                client=client,
                options=asked,
                progress=Progress(time.monotonic()),
                manifest=None if manifest is None else Path(manifest),
            ),
            report,
        )


def described(columns: Columns) -> dict[str, Any]:
    """What a manifest holds a run to: which columns make text and id."""
    found = {"text": columns.template or columns.text or "text", "id": columns.id, "keep": list(columns.keep)}
    return {name: value for name, value in found.items() if value}
