"""`embedq sink`, found by the command line through the entry points `embedq.commands`."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedq_batch.command import STOPPED, shown, until_stopped
from embedq_sdk.cli.embedding import job_arguments, job_options
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget, kafka_options
from embedq_sdk.cli.running import NO_ANSWER, say
from embedq_sdk.cli.running import run as run_command

if TYPE_CHECKING:
    from collections.abc import Callable


_STORES: Final = (
    "a store, whose rows are upserted: lancedb:FOLDER#TABLE, postgresql://…#TABLE or #TABLE:COLUMN, qdrant:ADDRESS#COLLECTION or "
    "milvus:ADDRESS#COLLECTION"
)


@click.command(name="sink")
@click.option(
    "--from",
    "source",
    required=True,
    help="results, for the results topic (of jobs that were submitted); or a topic of JSON documents: rows, Debezium's "
    "envelopes, what Connect's JsonConverter writes. A tombstone deletes.",
)
@click.option("--to", "target", required=True, help="A store, as embedq run has them: KIND:ADDRESS#NAME.")
@click.option(
    "--group",
    default="embedq-sink",
    show_default=True,
    help="The consumer group: its members share the topic.",
)
@click.option(
    "--dead-letters",
    help="The topic for what cannot be embedded or stored. Default: the first such record ends the command.",
)
@click.option("--text-column", help="The column with the text. Default: text.")
@click.option("--template", help='The text, made of several columns, such as "{title}: {body}".')
@click.option("--id-column", help="The column that tells documents apart. Default: the record's key.")
@click.option(
    "--keep", multiple=True, help="A column, or for results a field of the metadata, that goes along."
)
@job_options(
    dtypes=("float32", "float16", "binary"),
    dtype_help="What vectors are made of. Default: float32.",
)
@click.option(
    "--metrics",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file for figures in Prometheus' text format, as of embedq run.",
)
@kafka_options
def sink(
    source: str,
    target: str,
    group: str,
    dead_letters: str | None,
    text_column: str | None,
    template: str | None,
    id_column: str | None,
    keep: tuple[str, ...],
    metrics: Path | None,
    kafka: KafkaTarget,
    **job: Any,
) -> None:
    """Follow a topic into a vector store, until Ctrl-C; on as many machines as wanted.

    Offsets are committed after the store's acknowledgement, and everything is an upsert by id: a kill loses nothing, and leaves
    nothing twice.
    """
    if importlib.util.find_spec("pyarrow") is None:
        say("sink needs pyarrow: pip install 'embedq[batch]'")
        sys.exit(NO_ANSWER)
    import asyncio

    from embedq_batch.content.columns import Columns
    from embedq_batch.following.feeds import DocumentFeed, ResultFeed
    from embedq_batch.following.follow import Following, FollowOptions
    from embedq_batch.running.embedding import Embedder
    from embedq_batch.running.metrics import written
    from embedq_batch.running.progress import Progress, reported
    from embedq_batch.sinks.opening import opened_sink
    from embedq_batch.sinks.sink import Followed
    from embedq_sdk.client import EmbedClient
    from embedq_sdk.errors import InvalidArgument
    from embedq_sdk.job_options import JobOptions
    from embedq_sdk.transport.kafka import KafkaConnection
    from embedq_shared.topics import Topics

    progress = Progress(time.monotonic())

    async def work(report: Callable[[str], None]) -> int:
        columns = Columns(text=text_column, template=template, id=id_column, keep=keep)
        options = JobOptions(lane="bulk", **job_arguments(job))
        store = await asyncio.to_thread(opened_sink, target)
        if not isinstance(store, Followed):  # a file is made once all of its rows are there
            raise InvalidArgument(argument="to", expected=_STORES, got=target)
        results = source == "results"
        if results and options != JobOptions(lane="bulk", model_version=options.model_version):
            expected = "documents, where it is said what their vectors shall be; results have theirs"
            raise InvalidArgument(argument="from", expected=expected, got="results")
        feed: DocumentFeed | ResultFeed = (
            ResultFeed(columns, options.model_version) if results else DocumentFeed(columns)
        )
        client = EmbedClient(
            kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
        )

        def waits(reason: str | None) -> None:
            progress.waiting = reason

        async with client, reported(progress, report), written(progress, store.name, metrics):
            await Following(
                KafkaConnection.of(kafka.servers, kafka.security),
                feed,
                None if results else Embedder(client, options, waits),
                store,
                FollowOptions(
                    topic=Topics(kafka.prefix).results if results else source.removeprefix("kafka:"),
                    group=group,
                    dead_letters=dead_letters,
                ),
                progress,
            ).run()
        return 0

    try:
        with shown(progress) as report:
            run_command(until_stopped(work(report)))
    except KeyboardInterrupt:
        say(f"stopped: {progress.line(time.monotonic())}")
        sys.exit(STOPPED)
