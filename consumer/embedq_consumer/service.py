"""The whole story, start here: open the parts, load the model, run the loops until told to stop, stop them in order.

A job's path is `pipeline.py`, a reload's is `reload.py`. Every loop is a task of one group: when one fails, the process
ends with a non-zero exit code, and since no offset was committed before its answer, the next process repeats the rest.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batch_runner import BatchRunner
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.single_flight import QueuedText, SingleFlight
from embedq_consumer.batching.text_queue import TextQueue
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.cache.vector_cache import VectorCache
from embedq_consumer.delivery.deliverer import Deliverer
from embedq_consumer.delivery.publisher import Publisher
from embedq_consumer.delivery.result_records import ResultEncoder
from embedq_consumer.engine import default_batch_tokens, load_encoder
from embedq_consumer.intake.admission import AdmissionPolicy
from embedq_consumer.intake.flow_control import InFlightLimits
from embedq_consumer.intake.poll_loop import Intake
from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.model_slot import ModelSlot
from embedq_consumer.lifecycle.reloader import Reloader
from embedq_consumer.lifecycle.status_reporter import StatusReporter
from embedq_consumer.pipeline import Pipeline
from embedq_consumer.settings import Settings, SettingsError
from embedq_consumer.telemetry.health import Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.weighted_semaphore import WeightedSemaphore

log = structlog.get_logger()

_PULSE_S: Final = 0.5
_YOUNG_OBJECTS: Final = 20_000
"""New objects before a collection; the jobs in flight alone are some ten thousand."""


class MissingTopics(Exception):
    """The service creates no topic; the message says which are missing and what creates them."""


class DrainTimedOut(Exception):
    """Some jobs were not finished in time. None is lost: their offsets are not committed."""


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run one replica until `stop` is set, then finish what was accepted and leave."""
    settings = settings.named()
    initial, root = await asyncio.to_thread(_directories, settings)
    health = Health()
    metrics = Metrics()
    async with AsyncExitStack() as parts:
        server = HealthServer(settings.http_port, metrics.registry, health, host=settings.http_host)
        parts.push_async_callback(asyncio.to_thread, server.close)
        log.info("starting", replica=settings.replica, http_port=server.port)

        cache = await parts.enter_async_context(_cache(settings, metrics))
        publisher = await parts.enter_async_context(_publisher(settings, metrics))
        slot = ModelSlot(
            lambda path: load_encoder(
                path,
                device=settings.device,
                threads=settings.threads or None,
                quantization=settings.quantization,
                keep_bf16=settings.kept_layers,
                deterministic=settings.deterministic,
                known_models=Path(settings.compile_cache) / "models" if settings.compile_cache else None,
            )
        )
        parts.callback(slot.close)
        reporter = StatusReporter(
            settings.topics, settings.replica, settings.alias, publisher.publish, metrics
        )
        batch_tokens = settings.max_batch_tokens or await asyncio.to_thread(
            default_batch_tokens, settings.device
        )
        batcher = Batcher[QueuedText](
            BatchPolicy(
                max_tokens=batch_tokens,
                max_items=settings.max_batch_items,
                max_wait=settings.max_wait_ms / 1000,
                bulk_max_wait=settings.bulk_max_wait_s,
            )
        )
        budget = TokenBudget(batcher, metrics, health.tell)
        models = Reloader(
            slot,
            root=root,
            initial=initial,
            budget=budget,
            batch_tokens=batch_tokens,
            batch_items=settings.max_batch_items,
            reporter=reporter,
            metrics=metrics,
            drain_timeout_s=settings.drain_timeout_s,
        )

        # The desired model first, the jobs after: a late joiner must not answer with yesterday's model.
        health.set_ready("loading the model")
        control = ControlTopic(settings.kafka(), settings.topics, settings.alias, metrics)
        parts.push_async_callback(control.close)
        await models.start(await control.open())
        if stop.is_set():
            return
        _spare_collector()
        parts.callback(gc.unfreeze)  # else nothing frees the libraries' objects at exit, and some complain

        intake = Intake(
            settings.kafka(),
            topics=settings.topics,
            group=settings.group,
            flow=InFlightLimits(max_jobs=settings.max_in_flight_jobs, max_bytes=settings.max_in_flight_bytes),
            metrics=metrics,
            beat=lambda: health.beat("intake", time.monotonic()),
            max_poll_records=settings.max_poll_records,
            session_timeout_ms=settings.session_timeout_ms,
            rebalance_timeout_ms=settings.rebalance_timeout_ms,
            commit_interval_s=settings.commit_interval_ms / 1000,
            max_uncommitted=settings.max_uncommitted_jobs,
        )
        parts.push_async_callback(intake.close)
        await intake.open()

        async with _work() as work:
            results = ResultEncoder(settings.topics, settings.group, settings.max_result_bytes)
            memory = WeightedSemaphore(settings.max_pending_bytes)
            deliverer = Deliverer(results, publisher, intake.finish, memory, metrics)
            flights = SingleFlight()
            queue = TextQueue(flights, batcher, budget, metrics)
            pipeline = Pipeline(_rules(settings), lambda: slot.loaded.encoder, cache, queue, deliverer, work)
            parts.callback(queue.close)
            parts.callback(deliverer.close)
            runner = BatchRunner(flights, slot, budget, pipeline, metrics, work)
            worker = BatchLoop(batcher, runner.run, metrics, work)
            for loop in ("intake", "compute"):
                health.register(loop, settings.stall_timeout_s, time.monotonic())
            loops = [
                work.create_task(intake.run(pipeline.take, pipeline.take_unreadable), name="intake"),
                work.create_task(intake.commit_forever(), name="commit"),
                work.create_task(worker.run(), name="worker"),
                work.create_task(models.follow(control, intake.held), name="control"),
                work.create_task(reporter.repeat(), name="status"),
                work.create_task(_pulse(health, slot, metrics), name="pulse"),
                work.create_task(_ready(intake, health), name="ready"),
            ]

            await stop.wait()

            health.set_ready("draining")
            log.info("draining")
            drained = await intake.stop(settings.drain_timeout_s)
            await reporter.say("stopped", "STOPPED")
            if not drained:
                raise DrainTimedOut
            for task in loops:
                task.cancel()
    log.info("stopped")


@asynccontextmanager
async def _work() -> AsyncIterator[asyncio.TaskGroup]:
    """Every task of the service. A drain that took too long cancels what is left, and is no failure."""
    try:
        async with asyncio.TaskGroup() as work:
            yield work
    except* DrainTimedOut:
        log.warning("drain_timed_out")


@asynccontextmanager
async def _publisher(settings: Settings, metrics: Metrics) -> AsyncIterator[Publisher]:
    publisher = Publisher(
        settings.kafka(), metrics, max_bytes=16 * 1024 * 1024, timeout_s=settings.publish_timeout_s
    )
    await publisher.open()
    try:
        topics = settings.topics
        needed = (*topics.lanes, topics.results, topics.control, topics.status, topics.dead_letters)
        if missing := [topic for topic in needed if publisher.topics.partitions(topic) is None]:
            raise MissingTopics(
                f"no topic {', '.join(missing)} on the broker; `embedq topics create` makes them"
            )
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def _cache(settings: Settings, metrics: Metrics) -> AsyncIterator[VectorCache]:
    try:
        cache = VectorCache(
            settings.redis_url or None,
            metrics=metrics,
            ttl_s=settings.cache_ttl_s,
            timeout_s=settings.cache_timeout_ms / 1000,
        )
    except ValueError:  # its message may quote a password
        raise SettingsError("EMBEDQ_REDIS_URL: expected an address such as redis://HOST:6379/0") from None
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


def _directories(settings: Settings) -> tuple[Path, Path]:
    """The first model and the model root."""
    for name, directory in (("MODEL", Path(settings.model)), ("MODEL_ROOT", settings.root)):
        if not directory.is_dir():
            raise SettingsError(f"EMBEDQ_{name}: expected a directory, {directory} is none")
    return Path(settings.model).resolve(), settings.root


def _rules(settings: Settings) -> AdmissionPolicy:
    return AdmissionPolicy(
        topics=settings.topics,
        alias=settings.alias,
        max_inputs=settings.max_inputs,
        max_text_bytes=settings.max_text_bytes,
        max_result_bytes=settings.max_result_bytes,
        reply_patterns=settings.reply_patterns,
    )


def _spare_collector() -> None:
    """Take what is there for good out of the garbage collector's sight: libraries and the model, half a million objects.

    Each full collection would walk through them, and every thread would wait a quarter of a second, every other second
    under load. Jobs leave no cycles, so that a higher threshold costs little memory. A model that is loaded later is not
    frozen, and no model's weights wait for the collector (`Encoder.close`).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)


async def _ready(intake: Intake, health: Health) -> None:
    await intake.joined.wait()
    health.set_ready(None)
    log.info("ready")


async def _pulse(
    health: Health, slot: ModelSlot, metrics: Metrics, clock: Callable[[], float] = time.monotonic
) -> None:
    """The compute loop's heartbeat: an idle model is well, and one that computes is well for as long as its limit."""
    while True:
        now = clock()
        health.beat("compute", slot.busy_since or now)
        metrics.ready.set(health.ready(now).well)
        metrics.heartbeat_age.set(health.oldest_beat(now))
        await asyncio.sleep(_PULSE_S)
