"""The parts of a replica, each with how it is opened and closed. `service.py` says in which order, and what they do together."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog

from embedq_consumer.cache import BadCacheSetting, EntryCodec, SecretSource, VectorCache, load_secret
from embedq_consumer.delivery.deliverer import Deliverer, DeliveryLimits, Finish
from embedq_consumer.delivery.kafka_producer import KafkaProducers
from embedq_consumer.delivery.outgoing import Outgoing
from embedq_consumer.delivery.publisher import Publisher
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import (
    Cancellation,
    Encoder,
    Inspection,
    LoadOptions,
    default_batch_tokens,
    inspect_model,
    is_cpu,
    load_encoder,
    read_ahead,
)
from embedq_consumer.exactly_once import ReleaseLoop, make_release_loop, transactional_producers
from embedq_consumer.fairness import BulkTurns, InteractiveTraffic
from embedq_consumer.intake import Intake, make_jobs_clients
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.model_slot import Source
from embedq_consumer.lifecycle.served_model import ServedModel
from embedq_consumer.lifecycle.served_models import ServedModels
from embedq_consumer.quarantine import Suspects
from embedq_consumer.retries import RetryTiers
from embedq_consumer.rollout import FleetMember, StatusTopic
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.shapes import Mappings, MissingExtra, SchemaRegistry, connect
from embedq_consumer.telemetry.health import CannotListen, Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.backoff import backoff
from embedq_shared.kafka import BrokerUnreachable, KafkaConnectionError, reason
from embedq_shared.messages import STATUS_INTERVAL_S
from embedq_shared.topics import Topics

log = structlog.get_logger()

T = TypeVar("T")

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 2.0
"""Between two tries to reach Kafka, which takes seconds itself to start."""
_AWAY: Final = (BrokerUnreachable, KafkaConnectionError, TimeoutError)
"""Kafka is not there yet. A broker that is there and does not let us in says something else."""
_TRANSACTION_TIMEOUT_MS: Final = 15_000
"""How long the brokers leave a dead replica's transaction open: so long readers of its results wait, and the next owner of its
partitions. Longer than the steps of one that lives."""
_MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""Of one request to the broker, which may carry many results."""


class MissingTopics(Exception):
    """The service creates no topic; the message says which are missing and what creates them."""


class StoppedEarly(Exception):
    """Told to stop while Kafka was waited for: nothing was accepted yet."""


def check_directories(settings: Settings) -> None:
    begins = [("ALIASES", path) for path in settings.further_aliases.values()]
    for name, directory in (("MODEL", Path(settings.model)), ("MODEL_ROOT", settings.root), *begins):
        if not directory.is_dir():
            raise SettingsError(f"EMBEDQ_{name}: expected a directory, {directory} is not one")


async def once_kafka_answers(open: Callable[[], Awaitable[T]], health: Health, stop: asyncio.Event) -> T:
    """What `open` returns, once it can: it is called again as long as no broker can be reached.

    Raises:
        StoppedEarly: `stop` was set meanwhile.
    """
    attempt = 0
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while not stop.is_set():
            opening = asyncio.ensure_future(open())
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                await asyncio.wait({opening})
                break
            try:
                opened = opening.result()
            except _AWAY as error:
                if attempt == 0:
                    log.warning("waiting_for_kafka", reason=reason(error))
                health.hinder("start", f"waiting for Kafka: {reason(error)}")
            else:
                health.hinder("start", None)
                return opened
            pause = backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            await asyncio.wait({stopped}, timeout=pause)
            attempt += 1
        raise StoppedEarly
    finally:
        stopped.cancel()


@asynccontextmanager
async def open_health_pages(settings: Settings, metrics: Metrics, health: Health) -> AsyncIterator[None]:
    try:
        server = HealthServer(settings.http_port, metrics.registry, health, host=settings.http_host)
    except CannotListen as error:
        raise SettingsError(f"EMBEDQ_{error}") from error
    try:
        log.info("starting", replica=settings.replica, http_port=server.port)
        yield
    finally:
        await asyncio.to_thread(server.close)


@asynccontextmanager
async def open_cache(settings: Settings, metrics: Metrics) -> AsyncIterator[VectorCache]:
    options = settings.cache
    try:
        await asyncio.to_thread(options.redis.check)
        source = settings.cache_secret(os.environ) if options.redis.url else SecretSource()
        secret = await asyncio.to_thread(load_secret, source)
    except BadCacheSetting as error:
        raise SettingsError(f"EMBEDQ_{error}") from None
    try:
        cache = await asyncio.to_thread(VectorCache, options, EntryCodec(secret.value), metrics)
    except ValueError:  # its message may quote a password
        raise SettingsError("EMBEDQ_REDIS_URL: expected an address such as redis://HOST:6379/0") from None
    if options.redis.url:
        if secret.origin == "process":
            log.warning(
                "cache_key_not_kept",
                hint="this process's entries are of no use to any other, nor to the next one; set EMBEDQ_CACHE_KEY or "
                "EMBEDQ_CACHE_KEY_FILE",
            )
        else:
            log.info("cache_key", origin=secret.origin, file=secret.path)
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


@asynccontextmanager
async def open_publisher(
    settings: Settings,
    mappings: Mappings,
    bulk_turns: BulkTurns,
    metrics: Metrics,
    health: Health,
    stop: asyncio.Event,
) -> AsyncIterator[Publisher]:
    topics = settings.topics
    publisher = Publisher(
        KafkaProducers(settings.kafka(), max_bytes=_MAX_REQUEST_BYTES),
        metrics,
        # Half of a partition's jobs that are started: the other half goes on with places that work.
        max_held=max(1, min(settings.max_in_flight_jobs, settings.max_uncommitted_jobs) // 2),
        hinder=partial(health.hinder, "delivery"),
        ours=(topics.results, topics.replies, topics.dead_letters, topics.status, topics.control),
        bulk_turns=bulk_turns,
    )
    try:
        await once_kafka_answers(publisher.open, health, stop)
        needed = (*topics.lanes, topics.results, topics.control, topics.status, topics.dead_letters)
        if missing := [topic for topic in needed if publisher.topics.partitions(topic) is None]:
            raise MissingTopics(
                f"no topic {', '.join(missing)} on the broker, or none that this user may see; "
                f"`{_creation_of(topics)}` makes them"
            )
        if missing := [topic for topic in mappings.outputs if publisher.topics.partitions(topic) is None]:
            raise MissingTopics(
                f"no topic {', '.join(missing)} on the broker, or none that this user may see; the results of mappings go "
                "there, and whoever reads them decides how it is made"
            )
        if missing := [topic for topic in mappings.topics if publisher.topics.partitions(topic) is None]:
            # Connectors make their topics with the first row.
            log.warning("mapped_topics_missing", topics=missing, hint="they are read once they are there")
        yield publisher
    finally:
        await publisher.close()


def _creation_of(topics: Topics) -> str:
    """The command that makes a pool's topics; those that all pools share it makes without a pool."""
    command = "embedq topics create"
    return command if topics.pool is None else f"{command}; {command} --pool {topics.pool}"


class ModelLoader:
    """Makes encoders as the settings say, but for what a command says."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options

    def inspect(self, source: Source, cancel: Cancellation) -> Inspection:
        return inspect_model(source.path, self._of(source), cancel)

    def read_ahead(self, source: Source, cancel: Cancellation) -> bool:
        return read_ahead(source.path, self._of(source), cancel)

    def load(self, source: Source, cancel: Cancellation) -> Encoder:
        return load_encoder(source.path, self._of(source), cancel)

    def _of(self, source: Source) -> LoadOptions:
        options = self._options
        if source.tried:
            options = msgspec.structs.replace(options, dry_run_s=None)
        if source.quantization is None:
            return options
        kept = options.keep_bf16 if source.quantization == "fp8" else ()
        return msgspec.structs.replace(options, quantization=source.quantization, keep_bf16=kept)


@asynccontextmanager
async def open_models(
    settings: Settings,
    publisher: Publisher,
    traffic: InteractiveTraffic,
    cache: VectorCache,
    metrics: Metrics,
    health: Health,
) -> AsyncIterator[ServedModels]:
    batch_tokens = settings.max_batch_tokens or await asyncio.to_thread(
        default_batch_tokens, settings.device, settings.threads or None, settings.quantization
    )
    late = await asyncio.to_thread(is_cpu, settings.device)
    options = await asyncio.to_thread(settings.served_models, batch_tokens, late=late)

    loader = ModelLoader(await asyncio.to_thread(lambda: settings.load))
    announce = partial(publisher.announce, within=STATUS_INTERVAL_S)
    models = ServedModels(options, loader, announce, metrics, health.tell, traffic, cache)
    try:
        yield models
    finally:
        await asyncio.to_thread(models.close)


@asynccontextmanager
async def open_control(
    settings: Settings, model: ServedModel, metrics: Metrics
) -> AsyncIterator[ControlTopic]:
    control = ControlTopic(settings.kafka(), settings.topics, model.alias, metrics, routes=model.routes)
    try:
        yield control
    finally:
        await control.close()


@asynccontextmanager
async def open_fleet(settings: Settings, alias: str, publisher: Publisher) -> AsyncIterator[FleetMember]:
    """This replica's part in roll-outs of an alias; what the others have said is still to be read."""

    async def write(record: Outgoing) -> Exception | None:
        [problem] = await publisher.publish([record], timeout_s=STATUS_INTERVAL_S)
        return problem

    statuses = StatusTopic(settings.kafka(), settings.topics)
    try:
        yield FleetMember(statuses, settings.topics, settings.replica, alias, write)
    finally:
        await statuses.close()


@asynccontextmanager
async def open_schemas(settings: Settings, health: Health) -> AsyncIterator[SchemaRegistry | None]:
    """What is known of schemas, if there is a registry. It is not asked before the first record that needs it."""
    if (options := settings.schema_registry) is None:
        yield None
        return
    try:
        client = await asyncio.to_thread(connect, options)
    except MissingExtra as error:
        raise SettingsError(f"EMBEDQ_SCHEMA_REGISTRY_URL: {error}") from None
    except (ValueError, TypeError, OSError) as error:  # its message may quote a password
        raise SettingsError(
            f"EMBEDQ_SCHEMA_REGISTRY_URL: expected an address such as https://HOST:8081 ({type(error).__name__})"
        ) from None
    registry = SchemaRegistry(client, partial(health.hinder, "schemas"))
    try:
        yield registry
    finally:
        await registry.close()


@asynccontextmanager
async def open_intake(
    settings: Settings,
    mappings: Mappings,
    tiers: RetryTiers,
    suspects: Suspects,
    bulk_turns: BulkTurns,
    metrics: Metrics,
    health: Health,
    stop: asyncio.Event,
) -> AsyncIterator[Intake]:
    options = msgspec.structs.replace(settings.intake, retries=tiers, mappings=mappings)
    intake = Intake(
        make_jobs_clients(settings.kafka(), options),
        options,
        topics=settings.topics,
        metrics=metrics,
        beat=lambda: health.beat("intake", time.monotonic()),
        custodian=suspects,
        bulk_turns=bulk_turns,
    )
    try:
        await once_kafka_answers(intake.open, health, stop)
        yield intake
    finally:
        await intake.close()


@asynccontextmanager
async def open_releases(
    settings: Settings, publisher: Publisher, intake: Intake, results: ResultEncoder, health: Health
) -> AsyncIterator[ReleaseLoop | None]:
    """Exactly-once delivery of the bulk lane, if it is switched on."""
    if (options := settings.exactly_once) is None:
        yield None
        return
    releases = make_release_loop(
        options,
        transactional_producers(
            settings.kafka(),
            f"{settings.consumer_group}.{settings.replica}",
            timeout_ms=_TRANSACTION_TIMEOUT_MS,
            max_bytes=_MAX_REQUEST_BYTES,
        ),
        positions=intake.positions,
        committing=intake.committing,
        encoder=results,
        kafka=publisher,
        hinder=partial(health.hinder, "transactions"),
    )
    try:
        yield releases
    finally:
        await releases.close()


@asynccontextmanager
async def open_deliverer(
    settings: Settings,
    publisher: Publisher,
    results: ResultEncoder,
    releases: ReleaseLoop | None,
    intake: Intake,
    finish: Finish,
    bulk_turns: BulkTurns,
    metrics: Metrics,
) -> AsyncIterator[Deliverer]:
    limits = DeliveryLimits(reply_timeout_s=settings.reply_timeout_s, holds_back=intake.holds_back)
    deliverer = Deliverer(
        results,
        publisher,
        finish,
        metrics,
        limits,
        bulk=releases,
        when_first=intake.when_first,
        bulk_turns=bulk_turns,
    )
    try:
        yield deliverer
    finally:
        await asyncio.to_thread(deliverer.close)
