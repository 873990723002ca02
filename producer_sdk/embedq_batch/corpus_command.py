"""`embedq status --corpus`, found by that command through the entry point `embedq.status`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import click
import msgspec
from rich.console import Console

from embedq_batch.content.columns import recalled
from embedq_batch.corpus.counting import DEFAULT_MODEL, figures_of, model_of
from embedq_batch.corpus.figures import Figures
from embedq_batch.corpus.shown import lines, metrics
from embedq_batch.manifest.look import Look
from embedq_batch.running.embedding import Embedder
from embedq_batch.sinks.opening import opened_sink
from embedq_batch.sources.opening import opened_source
from embedq_sdk.cli.kafka_options import CONNECT_TIMEOUT_S, KafkaTarget
from embedq_sdk.cli.running import say
from embedq_sdk.client import EmbedClient
from embedq_sdk.errors import EmbedError
from embedq_sdk.job_options import JobOptions

_ANSWER_S: Final = 30.0
"""How long the service is asked which model it has: a person waits."""


async def show(
    target: str, source: Sequence[str], form: str, watch_s: float | None, kafka: KafkaTarget
) -> int:
    """Print how a target of `embedq run` stands: `form` is lines, json or metrics; again every `watch_s` seconds.

    Raises:
        BadSource, BadTarget, InvalidArgument, EmbedError.
    """
    console = Console()
    while True:
        found = await _figures(target, source, kafka)
        if watch_s is not None and console.is_terminal:
            console.clear()
        match form:
            case "json":
                click.echo(msgspec.json.encode(found))
            case "metrics":
                click.echo(metrics(found), nl=False)
            case _:
                click.echo("\n".join(lines(found)))
        if watch_s is None:
            return 0
        await asyncio.sleep(watch_s)


async def _figures(target: str, places: Sequence[str], kafka: KafkaTarget) -> Figures:
    sink = await asyncio.to_thread(opened_sink, target)

    def recorded() -> tuple[str, dict[str, object]]:
        if not sink.manifest.exists():
            return DEFAULT_MODEL, {}
        with Look(sink.manifest) as look:
            return model_of(look), {} if look.about is None else look.about.job

    model, job = await asyncio.to_thread(recorded)
    version = await _version(model, kafka)

    def counted() -> Figures:
        source = None
        if places:
            source = opened_source(
                places,
                recalled(job),
                servers=kafka.servers,
                security=kafka.security,
                prefix=kafka.prefix,
            )
        return figures_of(sink, source, version)

    return await asyncio.to_thread(counted)


async def _version(model: str, kafka: KafkaTarget) -> str | None:
    """The version that an alias has; None where nobody says so in time."""
    client = EmbedClient(
        kafka.servers, topic_prefix=kafka.prefix, connect_timeout=CONNECT_TIMEOUT_S, **kafka.security
    )
    options = JobOptions(model=None if model == DEFAULT_MODEL else model)
    try:
        async with asyncio.timeout(_ANSWER_S), client:
            return (await Embedder(client, options, lambda reason: None).probe()).model_version
    except (EmbedError, TimeoutError) as error:
        say(f"which version {model} has now is not known: {error or 'no answer'}")
        return None
